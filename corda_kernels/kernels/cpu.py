"""Kernels for the CPU, on the BLAS that torch itself runs on.

Where that is MKL its syrk is called, which torch itself does not; elsewhere products of panels come
near it. The obvious alternative, NumPy's `x.T @ x`, calls BLAS syrk but brings a second BLAS with a
thread pool of its own. Both pools spin for a while after each call, and inside a model's forward
pass they take the cores from each other: on 2 cores a linear layer (2048 × 576 → 576) followed by
NumPy's syrk took 24 ms, followed by the products below 13 ms, although both products alone took 5.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda_kernels.kernels import reference

# Rows in one product. The channels' statistics then read what the product has left in the cache, a
# copy of a half-precision input stays small, and the rounding error of a long stream at a few 1e-7.
# 1,024 rows cost 15 % more for each product, 4,096 no longer fit the cache (AMD EPYC, AVX-512).
_CHUNK_ROWS = 2048

# Triangles up to this width are computed in panels, wider ones halved first: at 576 channels panels
# gain 1.27 over addmm where halves gain 1.19, at 4096 it is 1.74 and 1.80, on MKL with AVX-512.
_PANELS_UP_TO = 768

# Rows of C in one panel. Narrower ones waste less beside the diagonal, and fill the BLAS's own
# tiles less well: 384 × 384 runs at 187 GFLOP/s, 192 × 192 at 166 and 96 × 96 at 132. Panels of
# rows take 4 to 10 % less than panels of columns (Intel Xeon), whose rows lie apart in memory.
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
    for rows in torch.split(x, _CHUNK_ROWS):
        _add_lower_(c, rows.to(c.dtype), alpha)
        reference.channel_statistics_(rows, absmax, outlier_count, outlier_threshold)


def _add_lower_(c: Tensor, x: Tensor, alpha: float) -> None:
    """c += alpha·xᵀx on the lower triangle, by MKL's syrk or by panels.

    One panel is as fast where it holds all of C, and more exact: for 12 to 37 channels MKL's syrk
    adds the rows one after another, which has up to ten times the rounding error of a product.
    """
    wide = c.shape[0] > _PANEL
    syrk = _mkl_syrk(c.dtype) if wide else None
    if syrk is not None and x.stride(1) == c.stride(1) == 1 and x.numel():
        syrk(c, x, alpha)
    else:
        _add_panels_(c, x, alpha)


@functools.cache
def _mkl_syrk(dtype: torch.dtype) -> Callable[[Tensor, Tensor, float], None] | None:
    """MKL's syrk, which the CPU builds of torch carry and use the threads of; None without it.

    It is looked up in torch's own library, by the name that MKL gives it there, and tried once.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    letter, number = {torch.float32: ("s", ctypes.c_float), torch.float64: ("d", ctypes.c_double)}[
        dtype
    ]
    try:
        routine: Any = getattr(ctypes.CDLL(str(library)), f"mkl_blas_{letter}syrk")
    except (OSError, AttributeError):
        return None

    def syrk(c: Tensor, x: Tensor, alpha: float) -> None:
        # Fortran reads a row-major matrix as its transpose: the lower triangle is its upper one.
        rows, channels, of_x, of_c = (
            ctypes.byref(ctypes.c_int64(size)) for size in (*x.shape, x.stride(0), c.stride(0))
        )
        factor, one = (ctypes.byref(number(value)) for value in (alpha, 1.0))
        inputs, total = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, c))
        upper, plain = ctypes.c_char_p(b"U"), ctypes.c_char_p(b"N")
        routine(upper, plain, channels, rows, factor, inputs, of_x, one, total, of_c)

    x = torch.arange(6, dtype=dtype).view(2, 3)
    found = torch.ones(3, 3, dtype=dtype)
    syrk(found, x, 2.0)
    right = torch.equal(found, torch.ones_like(found) + (2 * x.T @ x).tril())
    return syrk if right else None


def _add_panels_(c: Tensor, x: Tensor, alpha: float) -> None:
    """The triangle as two of half its size and the square between them, down to panels."""
    d = c.shape[0]
    if d <= _PANELS_UP_TO:
        for start in range(0, d, _PANEL):
            end = min(start + _PANEL, d)
            c[start:end, :end].addmm_(x[:, start:end].T, x[:, :end], alpha=alpha)
        return
    half = -(-d // (2 * _PANEL)) * _PANEL
    _add_panels_(c[:half, :half], x[:, :half], alpha)
    c[half:, :half].addmm_(x[:, half:].T, x[:, :half], alpha=alpha)
    _add_panels_(c[half:, half:], x[:, half:], alpha)


def symmetrize_(c: Tensor) -> Tensor:  # (*batch, d, d)
    """Copies the lower triangle onto the upper one, in place, panel by panel: a transposed read of
    the whole matrix takes four times as long (9 against 2.3 ms at 1536 channels)."""
    d = c.shape[-1]
    for start in range(0, d, _PANEL):
        end = min(start + _PANEL, d)
        reference.symmetrize_(c[..., start:end, start:end])
        c[..., start:end, end:] = c[..., end:, start:end].mT
    return c
