"""The factors of one layer's adapter: U, Σ, W → A, B and the residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corda_kernels.decomposition import CoSVD, regularized_inverse
from corda_kernels.decomposition.operand import panels
from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.precision import without_autocast

Balance = Literal["even", "paper"]
Step = Literal["lora"] | None
Reconstruction = Literal["projection", "inverse"]

BALANCES = ("even", "paper")
STEPS = (None, "lora")
RECONSTRUCTIONS = ("projection", "inverse")


@dataclass(frozen=True, eq=False)
class AdapterFactors:
    """A low-rank part of a weight, W ≈ scaling·B·A.

    Attributes:
        A: (rank, in) float64, or float32 as an adapter keeps it.
        B: (out, rank), likewise.
        scaling: factor of the product, LoRA's alpha/rank.
        damping: λ that the inverse of C took, as a multiple of the mean diagonal of C; None where
            nothing was inverted.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    damping: float | None = None


@without_autocast()
@torch.no_grad()
def adapter_factors(
    weight: Tensor,  # (out, in)
    co_svd: CoSVD,
    *,
    balance: Balance = "even",
    step: Step = None,
    reconstruction: Reconstruction = "projection",
    covariance: Tensor | None = None,  # (in, in)
) -> AdapterFactors:
    """Splits the projection of W on span U into trainable factors, scaling·B·A = U Uᵀ W.

    This is CorDA's B = U√Σ, A = √Σ VᵀC⁻¹ without its inverse, since VᵀC⁻¹ = Σ⁻¹UᵀW: exact where C
    is invertible, and defined where it is not. With aᵢ = uᵢᵀW the factors are Aᵢ = aᵢ/βᵢ, Bᵢ = βᵢuᵢ
    for any βᵢ > 0, which `balance` chooses. A component of W that vanishes gets A = 0 and the
    median β, so that it can still train. Of a decomposition with an output covariance D the
    projection is oblique, U (D U)ᵀ W, and aᵢ = (D uᵢ)ᵀ W.

    With the reconstruction as published, aᵢ = σᵢvᵢᵀ(C + λI)⁻¹ = uᵢᵀW(C + λI)·(C + λI)⁻¹. It is the
    same but for rounding, which grows with the condition of C (`benches/reconstruction.py`), and
    components that C does not see at all vanish.

    Args:
        weight: (out, in), any floating dtype.
        co_svd: its decomposition, U (out, rank).
        balance: "even" gives both factors the same RMS, whatever the units of C; "paper" takes
            βᵢ = √σᵢ, kept above 1e-3·√‖aᵢ‖.
        step: "lora" rescales A and B, and `scaling` against it, so that a first optimiser step of
            Adam changes W as much as it does with plain LoRA of scaling 1.
        reconstruction: "projection", or "inverse" for A through C⁻¹ as published.
        covariance: C (in, in), for reconstruction "inverse" only. λ is the decomposition's; where
            that has none, the inverse takes the least that works, `AdapterFactors.damping`.

    Raises:
        ConfigError: balance, step or reconstruction is unknown, or the covariance is missing or out
            of place.
        DecompositionError: the covariance has another size or cannot be inverted.

    Source: CorDA (arXiv:2406.05223), equations 3 to 5.
    """
    if balance not in BALANCES or step not in STEPS:
        raise ConfigError(
            f'balance must be "even" or "paper" and step None or "lora", got {balance!r}, {step!r}'
        )
    if reconstruction not in RECONSTRUCTIONS:
        raise ConfigError(
            f'reconstruction must be "projection" or "inverse", got {reconstruction!r}'
        )
    if (covariance is not None) != (reconstruction == "inverse"):
        raise ConfigError('reconstruction="inverse", and no other, needs the covariance')
    W = weight.to(co_svd.U.dtype)
    outputs, inputs = W.shape
    dual = co_svd.U if co_svd.dual is None else co_svd.dual
    projected = dual.mT @ W
    damping = None
    if covariance is not None:
        projected, damping = _through_inverse(projected, covariance, float(co_svd.damping))
    strength = projected.norm(dim=1)
    noise = max(outputs, inputs) * torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W)
    even = strength
    if co_svd.dual is not None:
        # Lengths are 1 otherwise. What counts as zero follows what aᵢ is computed from.
        even = strength / co_svd.U.norm(dim=0)
        noise = noise * co_svd.dual.norm(dim=0)
    if balance == "even":
        beta = even.sqrt() * (outputs / inputs) ** 0.25
    else:
        beta = torch.maximum(co_svd.S.sqrt(), 1e-3 * even.sqrt())
    live = strength > noise
    stand_in = beta[live].median() if bool(live.any()) else beta.new_tensor(1.0)
    beta = torch.where(live, beta, stand_in)
    A = torch.where(live[:, None], projected / beta[:, None], 0.0)
    B = co_svd.U * beta
    if step is None:
        return AdapterFactors(A, B, damping=damping)
    # Adam's first step changes every entry by the learning rate η, W hence by a matrix of norm²
    # η²·scaling·energy; plain LoRA, with B = 0 and E‖A‖² = rank/3, by one of η²·outputs·rank/3.
    energy = inputs * B.square().sum() + outputs * A.square().sum()
    scaling = float(outputs * A.shape[0] / 3 / energy)
    return AdapterFactors(A / scaling**0.5, B / scaling**0.5, scaling, damping)


def _through_inverse(
    projected: Tensor,  # UᵀW, (rank, in)
    covariance: Tensor,  # (in, in)
    damping: float,
) -> tuple[Tensor, float]:
    """ΣVᵀ(C + λI)⁻¹ with ΣVᵀ = UᵀW(C + λI), and the λ of the inverse.

    Either λ is a multiple of the mean diagonal of C; they differ only where the first, `damping`,
    is 0 and C cannot be inverted as it is.
    """
    inputs = projected.shape[1]
    if covariance.shape != (inputs, inputs):
        raise DecompositionError(
            f"a weight of {inputs} inputs needs a covariance ({inputs}, {inputs}), "
            f"got {tuple(covariance.shape)}"
        )
    C = covariance.to(projected)
    image = projected @ C + damping * C.diagonal().mean() * projected
    found = regularized_inverse(C, damping=damping or None)
    return image @ found.inverse, float(found.damping)


@without_autocast()
@torch.no_grad()
def residual(weight: Tensor, factors: AdapterFactors) -> Tensor:
    """The frozen part W' = W − scaling·B·A (out, in), summed in float64, in the weight's dtype."""
    A, B = (factor.to(weight.device, torch.float64) for factor in (factors.A, factors.B))
    left = torch.empty_like(weight)
    for rows in panels(weight.shape[0], weight.device):
        part = weight[rows].to(torch.float64, copy=True)
        left[rows] = part.addmm_(B[rows], A, alpha=-factors.scaling)
    return left
