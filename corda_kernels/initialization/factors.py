"""The factors of one layer's adapter: U, Σ, W → A, B and the residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corda_kernels.decomposition import CoSVD
from corda_kernels.errors import ConfigError

Balance = Literal["even", "paper"]
Step = Literal["lora"] | None

BALANCES = ("even", "paper")
STEPS = (None, "lora")


@dataclass(frozen=True, eq=False)
class AdapterFactors:
    """A low-rank part of a weight, W ≈ scaling·B·A.

    Attributes:
        A: (rank, in) float64.
        B: (out, rank) float64.
        scaling: factor of the product, LoRA's alpha/rank.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0


@torch.no_grad()
def adapter_factors(
    weight: Tensor,  # (out, in)
    co_svd: CoSVD,
    *,
    balance: Balance = "even",
    step: Step = None,
) -> AdapterFactors:
    """Splits the projection of W on span U into trainable factors, scaling·B·A = U Uᵀ W.

    This is CorDA's B = U√Σ, A = √Σ VᵀC⁻¹ without its inverse, since VᵀC⁻¹ = Σ⁻¹UᵀW: exact where C
    is invertible, and defined where it is not. With aᵢ = uᵢᵀW the factors are Aᵢ = aᵢ/βᵢ, Bᵢ = βᵢuᵢ
    for any βᵢ > 0, which `balance` chooses. A component of W that vanishes gets A = 0 and the
    median β, so that it can still train.

    Args:
        weight: (out, in), any floating dtype.
        co_svd: its decomposition, U (out, rank).
        balance: "even" gives both factors the same RMS, whatever the units of C; "paper" takes
            βᵢ = √σᵢ, kept above 1e-3·√‖aᵢ‖.
        step: "lora" rescales A and B, and `scaling` against it, so that a first optimiser step of
            Adam changes W as much as it does with plain LoRA of scaling 1.

    Raises:
        ConfigError: balance or step is unknown.

    Source: CorDA (arXiv:2406.05223), equations 3 to 5.
    """
    if balance not in BALANCES or step not in STEPS:
        raise ConfigError(
            f'balance must be "even" or "paper" and step None or "lora", got {balance!r}, {step!r}'
        )
    W = weight.to(co_svd.U.dtype)
    outputs, inputs = W.shape
    projected = co_svd.U.mT @ W
    strength = projected.norm(dim=1)
    if balance == "even":
        beta = strength.sqrt() * (outputs / inputs) ** 0.25
    else:
        beta = torch.maximum(co_svd.S.sqrt(), 1e-3 * strength.sqrt())
    noise = max(outputs, inputs) * torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W)
    live = strength > noise
    stand_in = beta[live].median() if bool(live.any()) else beta.new_tensor(1.0)
    beta = torch.where(live, beta, stand_in)
    A = torch.where(live[:, None], projected / beta[:, None], 0.0)
    B = co_svd.U * beta
    if step is None:
        return AdapterFactors(A, B)
    # Adam's first step changes every entry by the learning rate η, W hence by a matrix of norm²
    # η²·scaling·energy; plain LoRA, with B = 0 and E‖A‖² = rank/3, by one of η²·outputs·rank/3.
    energy = inputs * B.square().sum() + outputs * A.square().sum()
    scaling = float(outputs * A.shape[0] / 3 / energy)
    return AdapterFactors(A / scaling**0.5, B / scaling**0.5, scaling)


@torch.no_grad()
def residual(weight: Tensor, factors: AdapterFactors) -> Tensor:
    """The frozen part W' = W − scaling·B·A (out, in), summed in float64, in the weight's dtype."""
    W = weight.to(factors.A.dtype)
    return (W - factors.scaling * (factors.B @ factors.A)).to(weight.dtype)
