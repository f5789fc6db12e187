"""A symmetric matrix in half the space, by block copies alone.

The lower triangle [[L₁, ·], [F, L₂]] is kept as the rectangle F beside an almost square block that
holds L₁ in its lower part and L₂ᵀ in its upper part: LAPACK's rectangular full packed idea. No
index or mask of d² entries is needed, as gathering the triangle would.
"""

from __future__ import annotations

from torch import Tensor


def _split(d: int) -> tuple[int, int, int, int]:
    """Sizes of L₁ and L₂, the block's row at which L₁ starts, its column at which L₂ᵀ starts."""
    small = d // 2
    large = d - small
    return large, small, (1, 0)[large - small], (0, 1)[large - small]


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The d(d+1)/2 numbers of the lower triangle of a (d, d) matrix, flat, in its dtype."""
    d = matrix.shape[0]
    large, small, row, column = _split(d)
    size = (large + row) * large
    packed = matrix.new_empty(d * (d + 1) // 2)
    block = packed[:size].view(large + row, large)
    block[:row] = 0
    block[row:] = matrix[:large, :large].tril()
    block[:small, column:] += matrix[large:, large:].mT.triu()
    packed[size:].view(small, large).copy_(matrix[large:, :large])
    return packed


def unpack_symmetric(packed: Tensor, d: int, *, out: Tensor | None = None) -> Tensor:
    """The symmetric (d, d) matrix that `pack_symmetric` packed; in `out` if there is one."""
    large, small, row, column = _split(d)
    size = (large + row) * large
    block = packed[:size].view(large + row, large)
    matrix = packed.new_empty((d, d)) if out is None else out
    first = matrix[:large, :large]
    first.copy_(block[row:]).tril_()
    first += first.tril(-1).mT
    second = matrix[large:, large:]
    second.copy_(block[:small, column:]).triu_()
    second += second.triu(1).mT
    matrix[large:, :large] = packed[size:].view(small, large)
    matrix[:large, large:] = matrix[large:, :large].mT
    return matrix
