"""Kernels for the CPU, on the BLAS that torch itself runs on.

The obvious alternative, NumPy's `x.T @ x`, calls BLAS syrk but brings a second BLAS with a thread
pool of its own. Both pools spin for a while after each call, and inside a model's forward pass they
take the cores from each other: on 2 cores a linear layer (2048 × 576 → 576) followed by NumPy's
syrk took 24 ms, followed by the products below 13 ms, although both products alone took 5 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.kernels.reference import channel_statistics_

# Rows in one product. It bounds the copy of a half-precision input and keeps the rounding error of
# a long stream at a few 1e-7; with 2,048 rows MKL's products are 3 to 8 % slower.
_CHUNK_ROWS = 4096

# Entries read at a time for the statistics: both reductions then find them in the cache, which
# takes a third off their time (8192 × 1536: 6.5 ms against 9.7).
_STATISTICS_ENTRIES = 1 << 20

# Triangles up to this width are computed in panels, wider ones halved first. One or the other alone
# is slower on some BLAS: on MKL with AVX-512 1536 channels take 67 ms in panels and 73 ms by
# halves (addmm 97 ms), 4096 channels 199 ms in panels and 190 ms by halves (addmm 336 ms).
_PANELS_UP_TO = 1536

# Rows of C in one panel. Narrower ones waste less beside the diagonal, and fill the BLAS kernels
# less well: 128 and 256 are up to 5 and 10 % slower.
_PANEL = 192


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
        for rows in torch.split(chunk, max(1, _STATISTICS_ENTRIES // x.shape[1])):
            channel_statistics_(rows, absmax, outlier_count, outlier_threshold)


def _add_lower_(c: Tensor, x: Tensor, alpha: float) -> None:
    """The triangle as two of half its size and the square between them, down to panels."""
    d = c.shape[0]
    if d <= _PANELS_UP_TO:
        for start in range(0, d, _PANEL):
            end = min(start + _PANEL, d)
            c[start:end, :end].addmm_(x[:, start:end].T, x[:, :end], alpha=alpha)
        return
    half = (d // 2 + _PANEL - 1) // _PANEL * _PANEL
    _add_lower_(c[:half, :half], x[:, :half], alpha)
    c[half:, :half].addmm_(x[:, half:].T, x[:, :half], alpha=alpha)
    _add_lower_(c[half:, half:], x[:, half:], alpha)
