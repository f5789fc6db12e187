"""One end of the spectrum of W·C by a dense SVD, directions that C does not see included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from corda_kernels.linalg.triangle import orthogonal_factor

End = Literal["largest", "smallest"]


def exact(W: Tensor, C: Tensor, rank: int, which: End) -> tuple[Tensor, Tensor]:
    """By a dense SVD of the triangular factor of W·C, in float64.

    Args:
        W: (*batch, out, in).
        C: (*batch, in, in).
        rank: how many singular pairs.
        which: end of the spectrum they are at.

    Returns:
        U (*batch, out, rank) and S (*batch, rank), descending.
    """
    lift, W = no_taller(W)
    M = W @ C
    U, S, _ = torch.linalg.svd(torch.linalg.qr(M.mT, mode="r").R.mT)
    U = _order_null_block(W, U, S, S[..., 0] * null_share(W))
    if which == "largest":
        return lift(U[..., :rank]), S[..., :rank]
    return lift(U[..., -rank:]), S[..., -rank:]


def no_taller(W: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """W = Q R (*batch, out, in) with R no taller than wide: X ↦ Q X as a function, and R."""
    # Taken first, so that U lies in the range of W even where C is singular.
    return orthogonal_factor(W) if W.shape[-2] > W.shape[-1] else (lambda X: X, W)


def null_share(W: Tensor) -> float:
    """Singular values of W·C up to this share of the largest are zero to working precision."""
    return W.shape[-1] * torch.finfo(torch.float64).eps


def _order_null_block(W: Tensor, U: Tensor, S: Tensor, level: Tensor) -> Tensor:
    """Turns the vectors of σ = 0 among themselves into the limit that a damping λ → 0 gives.

    On them M = λW, so that they are the singular vectors of NᵀW, N the block of those vectors.
    """
    count = (level[..., None] >= S).sum(-1)
    if not bool(count.any()):
        return U
    ordered = U.clone()
    for index in map(tuple, torch.nonzero(count).tolist()):
        null = ordered[index][:, -int(count[index]) :]
        inside = null.mT @ W[index]
        null.copy_(null @ torch.linalg.svd(inside, full_matrices=False).U)
    return ordered
