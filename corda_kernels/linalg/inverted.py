"""Products with the inverse of W·C, by which to iterate towards its smallest singular values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corda_kernels.linalg.subspace import Operator
from corda_kernels.linalg.triangle import lower_triangle


def inverse_of_product(M: Tensor) -> tuple[Operator, Operator]:
    """Products with L⁻¹ and L⁻ᵀ, L the triangular factor of M (*batch, n, m), n ≤ m."""
    L = _floored(lower_triangle(M))
    return (
        lambda X: _solved(L, X, upper=False),
        lambda Y: _solved(L.mT, Y, upper=True),
    )


class InverseOfFactors(NamedTuple):
    """(W·C)⁻¹ = C⁻¹W⁻¹ of square W and positive definite C, by the factors of either.

    Neither the product nor its triangular factor is formed, which takes three times as long, and
    what rounding does to one factor is not multiplied by the condition of the other, so that
    float32 will do for a draft.

    Attributes:
        packed: (*batch, n, n), the LU factors of Wᵀ; of an upper triangular W, W itself.
        pivots: (*batch, n) int32, of the LU factors; None with an upper triangular W.
        root: (*batch, n, n), the lower Cholesky factor of C.
    """

    packed: Tensor
    pivots: Tensor | None
    root: Tensor

    @classmethod
    def of(cls, W: Tensor, C: Tensor, *, upper: bool) -> InverseOfFactors | None:
        """Of W, upper triangular or not, and C (*batch, n, n), float64.

        Both are overwritten. Where a C cannot be factored it is None, and W as it was.
        """
        # Both C and Wᵀ are by columns, as LAPACK takes them: all in place.
        info = torch.empty(W.shape[:-2], dtype=torch.int32, device=W.device)
        root, info = torch.linalg.cholesky_ex(C.mT, out=(C.mT, info))
        if bool((info != 0).any()):
            return None
        if upper:
            return cls(_floored(W), None, root)
        pivots = torch.empty(W.shape[:-1], dtype=torch.int32, device=W.device)
        # A zero on the diagonal is an entry below the floor.
        packed, pivots, _ = torch.linalg.lu_factor_ex(W.mT, out=(W.mT, pivots, info))
        return cls(_floored(packed), pivots, root)

    def single(self) -> InverseOfFactors:
        """In float32, where some inverses overflow."""
        return InverseOfFactors(self.packed.float(), self.pivots, self.root.float())

    def operators(self) -> tuple[Operator, Operator]:
        """Products with (W·C)⁻¹ and its transpose."""
        return (
            lambda X: self._covariance_solved(self._weight_solved(X)),
            lambda Y: self._weight_solved_transposed(self._covariance_solved(Y)),
        )

    def _weight_solved(self, X: Tensor) -> Tensor:
        if self.pivots is None:
            return _solved(self.packed, X, upper=True)
        solved: Tensor = torch.linalg.lu_solve(self.packed, self.pivots, X, adjoint=True)
        return solved

    def _weight_solved_transposed(self, X: Tensor) -> Tensor:
        if self.pivots is None:
            return _solved(self.packed.mT, X, upper=False)
        solved: Tensor = torch.linalg.lu_solve(self.packed, self.pivots, X)
        return solved

    def _covariance_solved(self, X: Tensor) -> Tensor:
        return _solved(self.root.mT, _solved(self.root, X, upper=False), upper=True)


def _solved(triangle: Tensor, X: Tensor, *, upper: bool) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(triangle, X, upper=upper)
    return solved


def _floored(triangle: Tensor) -> Tensor:
    """A triangle with no diagonal entry below eps times the largest, so that it can be divided by;
    the same tensor."""
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.abs().amax(-1, keepdim=True)
    floor = torch.where(largest > 0, torch.finfo(triangle.dtype).eps * largest, 1.0)
    diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))
    return triangle
