"""Dense factorisations in float64: one end of the spectrum of W·C, and triangular factors.

The triangles are by Cholesky where the conditioning allows it, which is cheaper than QR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from corda_kernels.kernels import syrk_

End = Literal["largest", "smallest"]

# The Gram matrix squares the condition. The diagonal of its factor understates the condition by up
# to 400 (measured on covariances of SmolLM2-135M), so that at this ratio the smallest singular
# values are still right to eps·(400/ratio)², 4e-5.
_LEAST_RATIO = 1e-3
# Of matrices that are nearly square, QR costs no more than a Gram matrix and its Cholesky factor.
_SLENDER = 2


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
    U, S, _ = torch.linalg.svd(torch.linalg.qr((W @ C).mT, mode="r").R.mT)
    # Vectors of σ = 0 are turned among themselves into the limit that a damping λ → 0 gives: on
    # them M = λW, so that they are the singular vectors of NᵀW, N the block of those vectors.
    null = (S[..., :1] * null_share(W) >= S).sum(-1)
    for index in map(tuple, torch.nonzero(null).tolist()):
        block = U[index][:, -int(null[index]) :]
        block.copy_(block @ torch.linalg.svd(block.mT @ W[index], full_matrices=False).U)
    kept = {"largest": slice(rank), "smallest": slice(-rank, None)}[which]
    return lift(U[..., kept]), S[..., kept]


def null_share(W: Tensor) -> float:
    """Singular values of W·C up to this share of the largest are zero to working precision."""
    return W.shape[-1] * torch.finfo(torch.float64).eps


def no_taller(W: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """W = Q R (*batch, out, in) with R no taller than wide: X ↦ Q X as a function, and R.

    X has orthonormal columns; so have those of Q X, which lie in the range of W even where C is
    singular. Of a W that is no taller than wide Q is the identity.
    """
    if W.shape[-2] <= W.shape[-1]:
        return lambda X: X, W
    factor = _gram_factor(W.mT)
    if factor is None:
        Q, R = torch.linalg.qr(W)
        return lambda X: Q @ X, R
    upper = factor.mT

    def lift(X: Tensor) -> Tensor:
        lifted = W @ torch.linalg.solve_triangular(upper, X, upper=True)
        # One Newton-Schulz step squares what the Gram matrix has cost of orthogonality.
        mended: Tensor = 1.5 * lifted - lifted @ (0.5 * (lifted.mT @ lifted))
        return mended

    return lift, upper


def lower_triangle(M: Tensor) -> Tensor:
    """L (*batch, n, n), lower triangular with L Lᵀ = M Mᵀ, for M (*batch, n, m) with n ≤ m.

    The left singular pairs of M are those of L.
    """
    factor = _gram_factor(M)
    if factor is not None:
        return factor
    lower: Tensor = torch.linalg.qr(M.mT, mode="r").R.mT
    return lower.contiguous()


def lower_gram(M: Tensor) -> Tensor:
    """M Mᵀ, (*batch, n, n), for M (*batch, n, m), of which only the lower triangle is filled."""
    flat = M.reshape(-1, *M.shape[-2:])
    gram = flat.new_zeros(*flat.shape[:2], flat.shape[1])
    for total, matrix in zip(gram, flat, strict=True):
        syrk_(total, matrix.mT)
    return gram.reshape(*M.shape[:-1], M.shape[-2])


def _gram_factor(M: Tensor) -> Tensor | None:
    """The Cholesky factor of M Mᵀ, (*batch, n, n), for M (*batch, n, m); None where M is not wide
    enough, or one of the batch too close to singular for it."""
    if M.shape[-1] < _SLENDER * M.shape[-2]:
        return None
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(lower_gram(M))
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    regular = (info == 0) & (diagonal.amin(-1) > _LEAST_RATIO * diagonal.amax(-1))
    return factor if bool(regular.all()) else None
