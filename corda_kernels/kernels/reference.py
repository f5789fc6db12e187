"""Plain torch: the truth every other backend is held to, and the fallback on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def syrk_(
    c: Tensor,  # (d, d)
    x: Tensor,  # (n, d)
    alpha: float,
    absmax: Tensor | None,  # (d,)
    outlier_count: Tensor | None,  # (d,)
    outlier_threshold: float,
    *_: object,  # precision and determinism: here always the best
) -> None:
    """c += alpha·xᵀx with x in c's dtype, with channel statistics. See `kernels.syrk_`."""
    rows = x.to(c.dtype)
    c.addmm_(rows.T, rows, alpha=alpha)
    channel_statistics_(x, absmax, outlier_count, outlier_threshold)


def channel_statistics_(
    x: Tensor,  # (n, d)
    absmax: Tensor | None,  # (d,)
    outlier_count: Tensor | None,  # (d,)
    outlier_threshold: float,
) -> None:
    """Folds each channel's largest |x| and its number of |x| above the threshold into the sums."""
    if absmax is None and outlier_count is None:
        return
    # Two reductions read x faster than one over |x|, which would have to be written first.
    largest = torch.maximum(x.amax(0), x.amin(0).neg())
    if absmax is not None:
        torch.maximum(absmax, largest.to(absmax.dtype), out=absmax)
    if outlier_count is not None:
        # Outliers sit in few channels, so that only those need to be counted.
        # Not `largest > threshold`: a channel that holds NaN may hold outliers as well.
        above = torch.nonzero(~(largest <= outlier_threshold)).squeeze(1)
        outlier_count[above] += (x[:, above].abs() > outlier_threshold).sum(0)


def symmetrize_(c: Tensor) -> Tensor:  # (*batch, d, d)
    """Copies the lower triangle onto the upper one, in place."""
    c.tril_()
    return c.add_(c.tril(-1).mT)
