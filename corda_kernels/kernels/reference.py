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
) -> None:
    """c += alpha·xᵀx with x in c's dtype; channel statistics beside it. See `corda_kernels.kernels.syrk_`."""
    rows = x.to(c.dtype)
    c.addmm_(rows.T, rows, alpha=alpha)
    channel_statistics_(x, absmax, outlier_count, outlier_threshold)


def channel_statistics_(
    x: Tensor,  # (n, d)
    absmax: Tensor | None,  # (d,)
    outlier_count: Tensor | None,  # (d,)
    outlier_threshold: float,
) -> None:
    """Folds the largest |x| and the number of |x| above the threshold, by channel, into the given tensors."""
    if absmax is None and outlier_count is None:
        return
    magnitude = x.abs()
    if absmax is not None:
        torch.maximum(absmax, magnitude.amax(0).to(absmax.dtype), out=absmax)
    if outlier_count is not None:
        outlier_count += (magnitude > outlier_threshold).sum(0)


def symmetrize_(c: Tensor) -> Tensor:  # (*batch, d, d)
    """Copies the lower triangle onto the upper one, in place."""
    c.tril_()
    return c.add_(c.tril(-1).mT)
