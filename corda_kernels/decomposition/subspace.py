"""A few left singular vectors at either end of the spectrum, by block Lanczos iteration, batched.

The method finds the leading eigenvectors of a symmetric operator A = back ∘ half. With half = Mᵀ
and back = M these are the left singular vectors of M for the largest σ. With half = L⁻¹ and
back = L⁻ᵀ, L the triangular factor of M, A is (M Mᵀ)⁻¹, and they are those for the smallest. Both
work on the left side alone: U obtained from V as M·V/σ would carry the error of V multiplied by
σ₁/σ. The arithmetic should be float64, but for a first draft.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

# Blocks of the basis at the first look at what has converged, in the first cycle and in later ones,
# and blocks at which to start afresh.
_FIRST_LOOK = (5, 2)
_MOST_BLOCKS = 8
_MOST_CYCLES = 10
# Up to this multiple of the tolerated error one more block, or application, will probably do.
_NEAR = 30
# Eigenvalues of A that differ by more than this are told apart by an SVD of half, not of its
# square: an eigenproblem's error is eps times the largest.
_SQUARABLE = 1e9
# The sine between a column and those before it from which on a Gram matrix in float64 will do: what
# rounding leaves of orthogonality, eps over its square or, in float32, eps over it, a second round
# takes off.
_LEAST_SINE = 1e-5


def leading_pairs(
    half: Operator,
    back: Operator,
    start: Tensor,  # (*batch, n, block)
    rank: int,
    *,
    tolerance: float,
    least_gap: float,
    gain: float,
    draft: tuple[Operator, Operator] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading left singular pairs of `back`, by block Lanczos iteration with restarts.

    It stops on an error of the wanted Ritz vectors that is estimated from the residuals A u − θ u
    of all Ritz vectors of the block, see `_error`. Within a cluster a subspace is as good as any
    other, so that small gaps do not count.

    Args:
        half: X (*batch, n, k) → (*batch, m, k), the transpose of `back`.
        back: Y (*batch, m, k) → (*batch, n, k).
        start: (*batch, n, block) random, block ≥ rank.
        rank: how many are wanted.
        tolerance: the error of the subspace, as a sine, at which to stop.
        least_gap: smaller gaps count as this one.
        gain: what one more application of A is expected to take off the error of Ritz vectors; if
            it takes off less, a new start goes by that.
        draft: half and back once more, for a first cycle in float32. What comes of it is measured
            with the float64 ones, and improved by them until it is good enough.

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
    near = False
    for cycle in range(_MOST_CYCLES):
        look = min(_FIRST_LOOK[cycle > 0], blocks)
        options = (rank, look, blocks, gain * tolerance, least_gap)
        if draft is not None and cycle == 0:
            rough_half, rough_back = draft
            drafted, reached = _lanczos(rough_half, rough_back, front.float(), *options)
            front = _orthonormal(drafted.double())
        elif not near:
            front, reached = _lanczos(half, back, front, *options)
        # Ritz pairs of A on this subspace, and once more A on them.
        right, triangle = torch.linalg.qr(half(front))
        left, sigma, turn = torch.linalg.svd(triangle)
        turned = back(right)
        applied = turned @ (left * sigma[..., None, :])
        error = _error(front @ turn.mT, applied, sigma.square(), rank, least_gap)
        front, factor = torch.linalg.qr(turned)
        gain = min(gain, max(1.0, reached / max(float(error.max()), tolerance)))
        if bool((error <= tolerance).all()) or bool(error.isnan().any()):
            break
        # Once more A costs less than a new start. What a good draft is off by is rounding, and this
        # takes most of it off.
        near = not near and bool((error <= _NEAR * tolerance).all())
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
    error that these had; in the dtype of `front`."""
    *batch, n, block = front.shape
    # Columns are kept as rows, so that more can join them without a copy.
    vectors, images = (front.new_empty(*batch, blocks * block, n) for _ in range(2))
    projected = front.new_zeros(*batch, blocks * block, blocks * block)
    size, before = 0, float("inf")
    while True:
        image = back(half(front))
        fresh = slice(size, size + block)
        vectors[..., fresh, :], images[..., fresh, :] = front.mT, image.mT
        size += block
        basis = vectors[..., :size, :].mT
        coordinates = basis.mT @ image
        projected[..., :size, fresh] = coordinates
        if size == look * block:
            theta, turn = _ritz(half, basis, projected[..., :size, :size])
            leading = turn[..., :block]
            applied = images[..., :size, :].mT @ leading
            error = float(_error(basis @ leading, applied, theta, rank, least_gap).max())
            # What float32 cannot tell apart more blocks do not, either.
            stuck = front.dtype == torch.float32 and error > before / 2
            if not error > tolerance or look == blocks or stuck:  # NaN ends it, too
                return _orthonormal(applied), error
            # A block takes off one to three orders of magnitude; a look costs as much as a block.
            before = error
            look = min(blocks, look + (1 if error < _NEAR * tolerance else 2))
        front = _next_block(basis, image, coordinates)


def _next_block(basis: Tensor, image: Tensor, coordinates: Tensor) -> Tensor:
    """Orthonormal columns that span what A adds to the basis.

    Args:
        basis: (*batch, n, k), orthonormal.
        image: (*batch, n, block), A of its last columns.
        coordinates: (*batch, k, block), basisᵀ image.
    """
    # Twice: of an image that lies in the basis the first round leaves nothing but rounding.
    fresh = _straightened(image - basis @ coordinates)
    return _straightened(fresh - basis @ (basis.mT @ fresh))


def _ritz(half: Operator, basis: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values θ, (*batch, k) descending, and the vectors' coordinates in the basis.

    `projected` is basisᵀ A basis, of which only the upper triangle is read.
    """
    # In float64 also in a draft: it is small, and an eigenproblem's error is eps times the largest.
    theta, turn = torch.linalg.eigh(projected.double(), UPLO="U")
    theta, turn = theta.flip(-1), turn.flip(-1)
    wanted = theta[..., : max(1, basis.shape[-1] // 4)]
    if bool((wanted[..., -1] * _SQUARABLE > wanted[..., 0]).all()):
        return theta.to(basis), turn.to(basis)
    triangle = torch.linalg.qr(half(basis), mode="r").R
    _, sigma, right = torch.linalg.svd(triangle)
    return sigma.square(), right.mT


def _error(
    ritz: Tensor,  # (*batch, n, block)
    applied: Tensor,  # (*batch, n, block), A of them
    theta: Tensor,  # (*batch, at least block)
    rank: int,
    least_gap: float,
) -> Tensor:
    """The error of the wanted Ritz vectors as a sine, (*batch), estimated: that of the worst.

    In the basis of the wanted Ritz vectors, the others of the block, and the rest, A is

        Θ₁   0    R₁ᵀ
        0    Θ₂   R₂ᵀ
        R₁   R₂   A₃

    To first order a wanted vector is off by q = ‖R₁‖/(θ₁ − ‖A₃‖) towards the rest and, by way of
    it, p = ‖R₂‖ q/(θ₁ − θ₂) towards another: a small gap behind the wanted ones counts with the
    product of two residuals. The Ritz value behind the block stands for ‖A₃‖.

    Source: the Riccati equation of an invariant subspace, to second order in the residuals; Stewart
    and Sun, Matrix Perturbation Theory, 1990, section V.2.
    """
    block = ritz.shape[-1]
    residual = (applied - ritz * theta[..., None, :block]).norm(dim=-2)
    wanted, others = theta[..., :rank], theta[..., rank:block]
    behind = theta[..., min(block, theta.shape[-1] - 1), None]
    outwards = residual[..., :rank] / _gap(wanted, behind, least_gap)
    between = _gap(wanted[..., None], others[..., None, :], least_gap)
    sideways = residual[..., None, rank:] * outwards[..., None] / between
    error: Tensor = torch.hypot(outwards, sideways.norm(dim=-1)).amax(-1)
    return error


def _gap(above: Tensor, below: Tensor, least: float) -> Tensor:
    """The difference, at least a share of the larger, to be divided by."""
    gap = torch.maximum(above - below, least * above)
    return gap.clamp_min(torch.finfo(gap.dtype).tiny)


def _orthonormal(X: Tensor) -> Tensor:
    """An orthonormal basis, (*batch, n, k), of the columns of X (*batch, n, k)."""
    return _straightened(_straightened(X))


def _straightened(X: Tensor) -> Tensor:
    """A basis of the columns of X (*batch, n, k), the closer to orthonormal the more X is.

    By Cholesky, of which two rounds cost a fraction of a QR; by QR, and orthonormal, where a column
    lies too close to the span of those before it.

    Source: Fukaya et al., "CholeskyQR2: a simple and communication-avoiding algorithm for computing
    a tall-skinny QR factorization on a large-scale parallel system", ScalA 2014.
    """
    wide = X.double()
    gram = wide.mT @ wide
    factor, info = torch.linalg.cholesky_ex(gram)
    sines = factor.diagonal(dim1=-2, dim2=-1).square() / gram.diagonal(dim1=-2, dim2=-1)
    sound = (info == 0) & (sines > _LEAST_SINE**2).all(-1)
    if bool(sound.all()):
        straight: Tensor = torch.linalg.solve_triangular(factor.mT.to(X), X, upper=True, left=False)
        return straight
    Q: Tensor = torch.linalg.qr(X).Q
    return Q
