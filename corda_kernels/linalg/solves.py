"""Products with the inverse of W·C and its transpose, by triangular factors."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from corda_kernels.linalg.exact import lower_triangle
from corda_kernels.linalg.operand import Operator

Operators = tuple[Operator, Operator]  # X ↦ A X and Y ↦ Aᵀ Y, see `krylov`

_solve = torch.linalg.solve_triangular


def inverse_of_product(M: Tensor) -> Operators:
    """Products with L⁻¹ and L⁻ᵀ, L the triangular factor of M (*batch, n, m), n ≤ m."""
    return _solves(_floored(lower_triangle(M)), upper=False)


def inverse_of_factors(
    W: Tensor, C: Tensor, *, upper: bool
) -> tuple[Operators, Operators | None] | None:
    """Products with (W·C)⁻¹ = C⁻¹W⁻¹ and its transpose, by the factors of either: LU and Cholesky.

    Neither the product nor its triangular factor is formed, which takes three times as long, and
    what rounding does to one factor is not multiplied by the condition of the other, so that
    float32 will do for a draft.

    Args:
        W: (*batch, n, n) float64, overwritten.
        C: (*batch, n, n) float64, positive definite, overwritten.
        upper: whether W is upper triangular, and its own factor.

    Returns:
        The products in float64, and in float32, where some overflow; None, and W as it was, where
        a C cannot be factored.
    """
    # Both C and Wᵀ are by columns, as LAPACK takes them: all in place.
    info = torch.empty(W.shape[:-2], dtype=torch.int32, device=W.device)
    root, info = torch.linalg.cholesky_ex(C.mT, out=(C.mT, info))
    if bool((info != 0).any()):
        return None
    packed, pivots = W, None
    if not upper:
        pivots = torch.empty(W.shape[:-1], dtype=torch.int32, device=W.device)
        # A zero on the diagonal is an entry below the floor.
        packed, pivots, _ = torch.linalg.lu_factor_ex(W.mT, out=(W.mT, pivots, info))
    _floored(packed)
    single = packed.float(), pivots, root.float()
    return _factor_solves(packed, pivots, root), _factor_solves(*single)


def _factor_solves(packed: Tensor, pivots: Tensor | None, root: Tensor) -> Operators:
    """Of C's Cholesky factor and the LU factors of Wᵀ or, without pivots, an upper triangular W."""
    lower, upper = _solves(root, upper=False)
    if pivots is None:
        weight, transposed = _solves(packed, upper=True)
    else:
        solve = partial(torch.linalg.lu_solve, packed, pivots)
        weight, transposed = partial(solve, adjoint=True), solve
    return lambda X: upper(lower(weight(X))), lambda Y: transposed(upper(lower(Y)))


def _solves(triangle: Tensor, *, upper: bool) -> Operators:
    """Products with T⁻¹ and T⁻ᵀ."""
    return partial(_solve, triangle, upper=upper), partial(_solve, triangle.mT, upper=not upper)


def _floored(triangle: Tensor) -> Tensor:
    """A triangle with no diagonal entry below eps times the largest, so that it can be divided by;
    the same tensor."""
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.abs().amax(-1, keepdim=True)
    floor = torch.where(largest > 0, torch.finfo(triangle.dtype).eps * largest, 1.0)
    diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))
    return triangle
