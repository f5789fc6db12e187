"""Triangular factors in float64, by the cheaper Cholesky where the conditioning allows it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corda_kernels.kernels import syrk_

# The Gram matrix squares the condition. The diagonal of its factor understates the condition by up
# to 400 (measured on covariances of SmolLM2-135M), so that at this ratio the smallest singular
# values are still right to eps·(400/ratio)², 4e-5.
_LEAST_RATIO = 1e-3
# Of matrices that are nearly square, QR costs no more than a Gram matrix and its Cholesky factor.
_SLENDER = 2


def lower_triangle(M: Tensor) -> Tensor:
    """L (*batch, n, n), lower triangular with L Lᵀ = M Mᵀ, for M (*batch, n, m) with n ≤ m.

    The left singular pairs of M are those of L.
    """
    factor = _gram_factor(M) if M.shape[-1] >= _SLENDER * M.shape[-2] else None
    if factor is not None:
        return factor
    lower: Tensor = torch.linalg.qr(M.mT, mode="r").R.mT
    return lower.contiguous()


def orthogonal_factor(W: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """W = Q R for W (*batch, out, in) with out > in: X ↦ Q X as a function, and R (*batch, in, in).

    X is (*batch, in, k) with orthonormal columns; so are those of Q X.
    """
    factor = _gram_factor(W.mT) if W.shape[-2] >= _SLENDER * W.shape[-1] else None
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


def lower_gram(M: Tensor) -> Tensor:
    """M Mᵀ, (*batch, n, n), for M (*batch, n, m), of which only the lower triangle is filled."""
    flat = M.reshape(-1, *M.shape[-2:])
    gram = flat.new_zeros(*flat.shape[:2], flat.shape[1])
    for total, matrix in zip(gram, flat, strict=True):
        syrk_(total, matrix.mT)
    return gram.reshape(*M.shape[:-1], M.shape[-2])


def _gram_factor(M: Tensor) -> Tensor | None:
    """The Cholesky factor of M Mᵀ, (*batch, n, n), or None where one of the batch is too close to
    singular for it."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(lower_gram(M))
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    regular = (info == 0) & (diagonal.amin(-1) > _LEAST_RATIO * diagonal.amax(-1))
    if not bool(regular.all()):
        return None
    return factor
