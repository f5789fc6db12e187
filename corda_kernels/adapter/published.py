"""CorDA's published form: U, Σ and W → A and B, and what they leave of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.adapter.factors import AdapterFactors, check_factors, component_rows
from corda_kernels.arguments import real_tensor
from corda_kernels.errors import DecompositionError
from corda_kernels.linalg import CoSVD
from corda_kernels.linalg.operand import panels
from corda_kernels.precision import without_autocast


@without_autocast()
@torch.no_grad()
def published_factors(weight: Tensor, co_svd: CoSVD) -> AdapterFactors:
    """CorDA's A and B as published: a part B·A = U Uᵀ W of the weight, to be taken out of it.

    This is B = U√Σ, A = √Σ VᵀC⁻¹ without its inverse, since VᵀC⁻¹ = Σ⁻¹UᵀW: exact where C is
    invertible, and defined where it is not. With aᵢ = uᵢᵀW the factors are Aᵢ = aᵢ/βᵢ, Bᵢ = βᵢuᵢ,
    where βᵢ = √σᵢ is kept above 1e-3·√‖aᵢ‖. A component of W that vanishes gets A = 0 and the
    median β, so that it can still train. Of a decomposition with an output covariance D the
    projection is oblique, U (D U)ᵀ W, and aᵢ = (D uᵢ)ᵀ W.

    The published reconstruction through the inverse is the same but for rounding, which grows with
    the condition of C; `benches/reconstruction.py` compares the two.

    Args:
        weight: (out, in), any floating dtype.
        co_svd: its decomposition, U (out, rank).

    Returns:
        A (rank, in) and B (out, rank) in the decomposition's dtype, with scaling 1.

    Raises:
        DecompositionError: the weight is no dense tensor of floating numbers, or the decomposition
            is not that of one of its shape.

    Source: CorDA (arXiv:2406.05223), equations 3 to 5.
    """
    rows, noise = component_rows(weight, co_svd)
    strength = rows.norm(dim=1)
    live = strength > noise
    # The columns of U have length 1 but where there is an output covariance.
    beta = torch.maximum(co_svd.S.sqrt(), 1e-3 * (strength / co_svd.U.norm(dim=0)).sqrt())
    stand_in = beta[live].median() if bool(live.any()) else beta.new_tensor(1.0)
    beta = torch.where(live, beta, stand_in)
    A = torch.where(live[:, None], rows / beta[:, None], 0.0)
    return AdapterFactors(A, co_svd.U * beta)


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
