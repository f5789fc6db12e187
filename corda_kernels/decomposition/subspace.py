"""A few left singular vectors at either end of the spectrum, by block Lanczos iteration, batched.

The method finds the leading eigenvectors of a symmetric operator A = back ∘ half. With half = Mᵀ
and back = M these are the left singular vectors of M for the largest σ. With half = L⁻¹ and
back = L⁻ᵀ, L the triangular factor of M, A is (M Mᵀ)⁻¹, and they are those for the smallest. Both
work on the left side alone: U obtained from V as M·V/σ would carry the error of V multiplied by
σ₁/σ. The arithmetic should be float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

# Blocks of the basis at the first look at what has converged, in the first cycle and in later ones,
# and blocks at which to start afresh.
_FIRST_LOOK = (4, 2)
_MOST_BLOCKS = 8
_MOST_CYCLES = 10
# Up to this multiple of the tolerated error one more block will probably do.
_NEAR = 30
# Eigenvalues of A that differ by more than this are told apart by an SVD of half, not of its
# square: an eigenproblem's error is eps times the largest.
_SQUARABLE = 1e9


def leading_pairs(
    half: Operator,
    back: Operator,
    start: Tensor,  # (*batch, n, block)
    rank: int,
    *,
    tolerance: float,
    least_gap: float,
    gain: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading left singular pairs of `back`, by block Lanczos iteration with restarts.

    It stops on the Ritz residuals ρ = ‖A u − θ u‖/θ of the wanted pairs. The error of the subspace
    is at most about the residual over the gap, (θ_r − θ_r+1)/θ_r; this quotient is held to the
    tolerance. Within a cluster a subspace is as good as any other, so that small gaps do not count.

    Args:
        half: X (*batch, n, k) → (*batch, m, k), the transpose of `back`.
        back: Y (*batch, m, k) → (*batch, n, k).
        start: (*batch, n, block) random, block ≥ rank.
        rank: how many are wanted.
        tolerance: the error of the subspace, as a sine, at which to stop.
        least_gap: smaller gaps count as this one.
        gain: what one more application of A is expected to take off the error of Ritz vectors; if
            it takes off less, a new start goes by that.

    Returns:
        U (*batch, n, rank), the singular values of `back` (*batch, rank) descending, and the error
        (*batch) estimated before the last application of A: above the tolerance where the iteration
        did not converge.

    Source: Golub, Luk and Overton, "A block Lanczos method for computing the singular values and
    corresponding singular vectors of a matrix", ACM TOMS 1981; here with full reorthogonalisation.
    """
    n, block = start.shape[-2:]
    blocks = max(1, min(_MOST_BLOCKS, n // (2 * block)))
    front = _orthonormal(start)
    for cycle in range(_MOST_CYCLES):
        look = min(_FIRST_LOOK[cycle > 0], blocks)
        front, reached = _lanczos(
            half, back, front, rank, look, blocks, gain * tolerance, least_gap
        )
        # Ritz pairs of A on this subspace, and once more A on them.
        right, triangle = torch.linalg.qr(half(front))
        turned = back(right)
        _, sigma, turn = torch.linalg.svd(triangle)
        error = _error(front, turned @ triangle, sigma.square(), turn.mT, rank, least_gap)
        front, factor = torch.linalg.qr(turned)
        gain = min(gain, max(1.0, reached / max(float(error.max()), tolerance)))
        if bool((error <= tolerance).all()) or bool(error.isnan().any()):
            break
    left, values, _ = torch.linalg.svd(factor)
    return front @ left[..., :rank], values[..., :rank], error


def _lanczos(
    half: Operator,
    back: Operator,
    front: Tensor,  # (*batch, n, block), orthonormal
    rank: int,
    look: int,
    blocks: int,
    tolerance: float,
    least_gap: float,
) -> tuple[Tensor, float]:
    """An orthonormal block, (*batch, n, block), of A applied to the leading Ritz vectors, and the
    error that these had."""
    block = front.shape[-1]
    basis, images = front, back(half(front))
    while True:
        while basis.shape[-1] < look * block:
            front = _next_block(basis, images[..., -block:])
            basis = torch.cat([basis, front], -1)
            images = torch.cat([images, back(half(front))], -1)
        theta, turn = _ritz(half, basis, images)
        error = float(_error(basis, images, theta, turn, rank, least_gap).max())
        if not error > tolerance or look == blocks:  # NaN ends it, too
            return _orthonormal(images @ turn[..., :block]), error
        # A block takes off one to three orders of magnitude; a look costs about as much as a block.
        look = min(blocks, look + (1 if error < _NEAR * tolerance else 2))


def _next_block(basis: Tensor, image: Tensor) -> Tensor:
    """Orthonormal columns that span what A adds to the basis."""
    # Twice: of an image that lies in the basis the first round leaves nothing but rounding.
    fresh = image
    for _ in range(2):
        fresh = _orthonormal(fresh - basis @ (basis.mT @ fresh))
    return fresh


def _ritz(half: Operator, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values θ, (*batch, k) descending, and the vectors' coordinates in the basis."""
    projected = basis.mT @ images
    theta, turn = torch.linalg.eigh((projected + projected.mT) / 2)
    theta, turn = theta.flip(-1), turn.flip(-1)
    wanted = theta[..., : max(1, basis.shape[-1] // 4)]
    if bool((wanted[..., -1] * _SQUARABLE > wanted[..., 0]).all()):
        return theta, turn
    triangle = torch.linalg.qr(half(basis), mode="r").R
    _, sigma, right = torch.linalg.svd(triangle)
    return sigma.square(), right.mT


def _error(
    basis: Tensor, images: Tensor, theta: Tensor, turn: Tensor, rank: int, least_gap: float
) -> Tensor:
    """The largest residual of the leading Ritz pairs over the gap behind them, (*batch)."""
    coordinates, values = turn[..., :rank], theta[..., :rank]
    difference = images @ coordinates - basis @ (coordinates * values[..., None, :])
    tiny = torch.finfo(theta.dtype).tiny
    residual: Tensor = (difference.norm(dim=-2) / values.clamp_min(tiny)).amax(-1)
    following = theta[..., min(rank, theta.shape[-1] - 1)]
    gap = 1 - following / values[..., -1].clamp_min(tiny)
    return residual / gap.clamp_min(least_gap)


def _orthonormal(X: Tensor) -> Tensor:
    """An orthonormal basis, (*batch, n, k), of the columns of X (*batch, n, k)."""
    Q: Tensor = torch.linalg.qr(X).Q
    return Q
