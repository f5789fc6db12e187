"""A symmetric matrix in half the space, by block copies alone.

The lower triangle [[L₁, ·], [F, L₂]] is kept as the rectangle F beside an almost square block that
holds L₁ in its lower part and L₂ᵀ in its upper part: LAPACK's rectangular full packed idea. No
index or mask of d² entries is needed, as gathering the triangle would.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _split(d: int) -> tuple[int, int, int, int]:
    """Sizes of L₁ and L₂, the block's row at which L₁ starts, its column at which L₂ᵀ starts."""
    small = d // 2
    large = d - small
    return large, small, (1, 0)[large - small], (0, 1)[large - small]


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The d(d+1)/2 numbers of the lower triangle of a (d, d) matrix, flat, in its dtype."""
    large, small, row, column = _split(matrix.shape[0])
    block = matrix.new_zeros((large + row, large))
    block[row:] = matrix[:large, :large].tril()
    block[:small, column:] += matrix[large:, large:].mT.triu()
    return torch.cat([block.flatten(), matrix[large:, :large].flatten()])


def unpack_symmetric(packed: Tensor, d: int) -> Tensor:
    """The symmetric (d, d) matrix that `pack_symmetric` packed."""
    large, small, row, column = _split(d)
    size = (large + row) * large
    block = packed[:size].view(large + row, large)
    matrix = packed.new_empty((d, d))
    first = block[row:].tril()
    matrix[:large, :large] = first + first.tril(-1).mT
    second = block[:small, column:].triu()
    matrix[large:, large:] = second + second.triu(1).mT
    matrix[large:, :large] = packed[size:].view(small, large)
    matrix[:large, large:] = matrix[large:, :large].mT
    return matrix
