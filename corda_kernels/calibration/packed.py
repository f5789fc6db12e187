"""A symmetric matrix as the numbers of its triangle, and back."""

from __future__ import annotations

from torch import Tensor

from corda_kernels.kernels import symmetrize_


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The d(d+1)/2 numbers of the lower triangle of a (d, d) matrix, flat, in its dtype.

    LAPACK's rectangular full packed idea: of the triangle [[L₁, ·], [F, L₂]] the rectangle F lies
    beside an almost square block, which holds L₁ in its lower part and L₂ᵀ in its upper part. Block
    copies need no index or mask of d² entries, as gathering the triangle would.
    """
    d = matrix.shape[0]
    packed = matrix.new_empty(d * (d + 1) // 2)
    block, rectangle, row, column = _packed_parts(packed, d)
    small, large = rectangle.shape
    block[:row] = 0
    block[row:] = matrix[:large, :large].tril()
    block[:small, column:] += matrix[large:, large:].mT.triu()
    rectangle.copy_(matrix[large:, :large])
    return packed


def unpack_symmetric(packed: Tensor, d: int, *, out: Tensor | None = None) -> Tensor:
    """The symmetric (d, d) matrix that `pack_symmetric` packed; in `out` if there is one."""
    block, rectangle, row, column = _packed_parts(packed, d)
    small, large = rectangle.shape
    matrix = packed.new_empty((d, d)) if out is None else out
    matrix[:large, :large] = block[row:]
    matrix[large:, large:] = block[:small, column:].mT
    matrix[large:, :large] = rectangle
    return symmetrize_(matrix)


def _packed_parts(packed: Tensor, d: int) -> tuple[Tensor, Tensor, int, int]:
    """The block, the rectangle, and where in the block L₁ starts (row) and L₂ᵀ (column)."""
    small = d // 2
    large = d - small
    row, column = (1, 0) if large == small else (0, 1)
    size = (large + row) * large
    block, rectangle = packed[:size], packed[size:]
    return block.view(large + row, large), rectangle.view(small, large), row, column
