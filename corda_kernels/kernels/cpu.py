"""Kernels for the CPU, on the BLAS that torch itself runs on.

The obvious alternative, NumPy's `x.T @ x`, calls BLAS syrk but brings a second BLAS with a thread
pool of its own. Both pools spin for a while after each call, and inside a model's forward pass they
take the cores from each other: on 2 cores a linear layer (2048 × 576 → 576) followed by NumPy's
syrk took 24 ms, followed by the halving below 13 ms, although both products alone took 5 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.kernels.reference import channel_statistics_

# Rows in one product. It bounds the copy of a half-precision input, keeps what the blocks of one
# chunk share in the cache, and keeps the rounding error of a long stream at a few 1e-7.
_CHUNK_ROWS = 2048

# Width up to which a diagonal block is computed whole: 1.6 to 2.0 times addmm at 8192 × 1536 and
# 4096 × 4096, as with 96 … 288; with 512 and more it falls to 1.
_LEAF = 192


def syrk_(
    c: Tensor,  # (d, d)
    x: Tensor,  # (n, d)
    alpha: float,
    absmax: Tensor | None,  # (d,)
    outlier_count: Tensor | None,  # (d,)
    outlier_threshold: float,
    *_: object,  # precision and determinism: here always the best
) -> None:
    """c += alpha·xᵀx, lower triangle only, with channel statistics. See `kernels.syrk_`."""
    for chunk in torch.split(x, _CHUNK_ROWS):
        _add_lower_(c, chunk.to(c.dtype), alpha)
        channel_statistics_(chunk, absmax, outlier_count, outlier_threshold)


def _add_lower_(c: Tensor, x: Tensor, alpha: float) -> None:
    """The triangle as two triangles of half the size and the square below the first."""
    d = c.shape[0]
    if d <= _LEAF:
        c.addmm_(x.T, x, alpha=alpha)
        return
    half = (d // 2 + 15) // 16 * 16
    _add_lower_(c[:half, :half], x[:, :half], alpha)
    c[half:, :half].addmm_(x[:, half:].T, x[:, :half], alpha=alpha)
    _add_lower_(c[half:, half:], x[:, half:], alpha)
