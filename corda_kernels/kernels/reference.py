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
    """Folds each channel's largest |x| and its number of |x| above the threshold into the sums.

    NaN counts in neither.
    """
    if absmax is None and outlier_count is None:
        return
    # Two reductions read x faster than one over |x|, which would have to be written first.
    largest = torch.maximum(x.amax(0), x.amin(0).neg())
    if absmax is not None:
        broken = torch.nonzero(largest.isnan()).squeeze(1)
        found = largest.to(absmax.dtype)
        if len(broken):
            magnitudes = x[:, broken].abs().to(absmax.dtype)
            found[broken] = magnitudes.masked_fill(magnitudes.isnan(), 0).amax(0)
        torch.maximum(absmax, found, out=absmax)
    if outlier_count is not None:
        # Outliers sit in few channels, so that only those need to be counted.
        # Not `largest > threshold`: a channel that holds NaN may hold outliers as well.
        above = torch.nonzero(~(largest <= outlier_threshold)).squeeze(1)
        outlier_count[above] += (x[:, above].abs() > outlier_threshold).sum(0)


def symmetrize_(c: Tensor) -> Tensor:  # (*batch, d, d)
    """Copies the lower triangle onto the upper one, in place."""
    c.tril_()
    return c.add_(c.tril(-1).mT)


def batched_svd(
    t: Tensor,  # (b, l, l)
    exact: bool,
) -> tuple[Tensor, Tensor]:  # (b, l, l), (b, l)
    """U and S in float64. See `kernels.batched_svd`."""
    finite = torch.isfinite(t).all(-1).all(-1)
    wide = torch.where(finite[:, None, None], t, 0).double()
    # On a GPU torch takes matrices one after the other, and eigenvectors are found several times
    # as fast.
    U, S = gram_svd(wide) if t.is_cuda and not exact else torch.linalg.svd(wide)[:2]
    U = torch.where(finite[:, None, None], U, torch.nan)
    S = torch.where(finite[:, None], S, torch.nan)
    return U.to(t.dtype), S.to(t.dtype)


def gram_svd(t: Tensor) -> tuple[Tensor, Tensor]:  # (b, l, l) float64 → (b, l, l), (b, l)
    """U and S by the eigenvectors of t·tᵀ.

    Squaring blurs directions whose σ is within the square root of eps of the largest σ: below 1e-8
    of it they mix, and each σ is then that of its mixture.
    """
    scale = t.abs().amax((-2, -1), keepdim=True)
    scaled = t / torch.where(scale > 0, scale, 1)  # so that no square overflows
    U = torch.linalg.eigh(scaled @ scaled.mT).eigenvectors
    # ‖uᵀt‖ is closer than the root of an eigenvalue, which may be negative, but not quite in order.
    S, order = (U.mT @ scaled).norm(dim=-1).sort(descending=True)
    return U.gather(-1, order[:, None, :].expand_as(U)), S * scale[..., 0]
