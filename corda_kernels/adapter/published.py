"""CorDA's published form: U, Σ and W → A and B, and what they leave of the weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from corda_kernels.adapter.factors import AdapterFactors, check_factors, component_rows
from corda_kernels.arguments import one_of, real_tensor
from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.linalg import CoSVD, regularized_inverse
from corda_kernels.linalg.operand import panels
from corda_kernels.precision import without_autocast


@without_autocast()
@torch.no_grad()
def published_factors(
    weight: Tensor,  # (out, in)
    co_svd: CoSVD,
    *,
    reconstruction: Literal["projection", "inverse"] = "projection",
    covariance: Tensor | None = None,  # (in, in)
) -> AdapterFactors:
    """CorDA's A and B as published: a part B·A = U Uᵀ W of the weight, to be taken out of it.

    This is B = U√Σ, A = √Σ VᵀC⁻¹ without its inverse, since VᵀC⁻¹ = Σ⁻¹UᵀW: exact where C is
    invertible, and defined where it is not. With aᵢ = uᵢᵀW the factors are Aᵢ = aᵢ/βᵢ, Bᵢ = βᵢuᵢ,
    where βᵢ = √σᵢ is kept above 1e-3·√‖aᵢ‖. A component of W that vanishes gets A = 0 and the
    median β, so that it can still train. Of a decomposition with an output covariance D the
    projection is oblique, U (D U)ᵀ W, and aᵢ = (D uᵢ)ᵀ W.

    With the reconstruction as published, aᵢ = σᵢvᵢᵀ(C + λI)⁻¹ = uᵢᵀW(C + λI)·(C + λI)⁻¹. It is the
    same but for rounding, which grows with the condition of C (`benches/reconstruction.py`), and
    components that C does not see at all vanish.

    Args:
        weight: (out, in), any floating dtype.
        co_svd: its decomposition, U (out, rank).
        reconstruction: "projection", or "inverse" for A through C⁻¹ as published.
        covariance: C (in, in), for reconstruction "inverse" only. λ is the decomposition's; where
            that has none, the inverse takes the least that works, `AdapterFactors.damping`.

    Returns:
        A (rank, in) and B (out, rank) in the decomposition's dtype, with scaling 1.

    Raises:
        ConfigError: reconstruction is unknown, or the covariance is missing or out of place.
        DecompositionError: an input is no dense tensor of floating numbers, the decomposition or
            the covariance is of another size, or the covariance cannot be inverted.

    Source: CorDA (arXiv:2406.05223), equations 3 to 5.
    """
    one_of("reconstruction", reconstruction, ("projection", "inverse"))
    rows, noise = component_rows(weight, co_svd)
    if (covariance is not None) != (reconstruction == "inverse"):
        raise ConfigError('reconstruction="inverse", and no other, needs the covariance')
    damping = None
    if covariance is not None:
        rows, damping = _through_inverse(rows, covariance, float(co_svd.damping))
    strength = rows.norm(dim=1)
    live = strength > noise
    # The columns of U have length 1 but where there is an output covariance.
    beta = torch.maximum(co_svd.S.sqrt(), 1e-3 * (strength / co_svd.U.norm(dim=0)).sqrt())
    stand_in = beta[live].median() if bool(live.any()) else beta.new_tensor(1.0)
    beta = torch.where(live, beta, stand_in)
    A = torch.where(live[:, None], rows / beta[:, None], 0.0)
    return AdapterFactors(A, co_svd.U * beta, damping=damping)


def _through_inverse(projected: Tensor, covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """ΣVᵀ(C + λI)⁻¹ with ΣVᵀ = UᵀW(C + λI), of UᵀW (rank, in) and C, and the λ of the inverse.

    Either λ is a multiple of the mean diagonal of C; they differ only where the first, `damping`,
    is 0 and C cannot be inverted as it is.
    """
    real_tensor("the covariance", covariance, DecompositionError)
    needed, given = (projected.shape[1],) * 2, tuple(covariance.shape)
    if given != needed:
        raise DecompositionError(f"the weight needs a covariance {needed}, got {given}")
    C = covariance.to(projected)
    image = projected @ C + damping * C.diagonal().mean() * projected
    found = regularized_inverse(C, damping=damping or None)
    return image @ found.inverse, float(found.damping)


@without_autocast()
@torch.no_grad()
def residual(weight: Tensor, factors: AdapterFactors) -> Tensor:
    """The frozen part W' = W − scaling·B·A (out, in), summed in float64, in the weight's dtype.

    Raises:
        DecompositionError: the weight is no dense tensor of floating numbers, or the factors are
            none, or of another layer's size.
    """
    real_tensor("the weight", weight, DecompositionError)
    check_factors(factors, tuple(weight.shape), DecompositionError)
    A, B = (factor.to(weight.device, torch.float64) for factor in (factors.A, factors.B))
    left = torch.empty_like(weight)
    for rows in panels(weight.shape[0], weight.device):
        part = weight[rows].to(torch.float64, copy=True)
        left[rows] = part.addmm_(B[rows], A, alpha=-factors.scaling)
    return left
