"""A few singular vectors at either end of the spectrum, by block Golub-Kahan iteration, batched.

The method finds the leading eigenvectors of a symmetric operator A = back ∘ half. With half = Mᵀ
and back = M these are the left singular vectors of M for the largest σ. With half = M⁻¹ and
back = M⁻ᵀ, or those of a triangular factor of M, A is (M Mᵀ)⁻¹, and they are those for the
smallest. There U has to come from the left side: obtained from V as M·V/σ it would carry the error
of V multiplied by σ₁/σ. The arithmetic should be float64, but for a first draft.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corda_kernels.errors import DecompositionError
from corda_kernels.kernels import batched_svd

Operator = Callable[[Tensor], Tensor]

_OUT_OF_RANGE = (
    "W·C leaves the range of float64: scale the weight or the covariance to sizes near 1"
)

# Blocks of the basis at the first look at what has converged, in the first cycle and in later ones;
# on a CPU a look costs as much as a block, on a GPU as several. Blocks at which to start afresh.
_FIRST_LOOK = (4, 2)
_FIRST_LOOK_GPU = (6, 3)
_MOST_BLOCKS = 8
_MOST_CYCLES = 10
# Up to this multiple of the tolerated error one more block, or application, will probably do.
_NEAR = 30
# Eigenvalues of A that differ by more than this are told apart by an SVD of the triangle, not of
# its square: an eigenproblem's error is eps times the largest.
_SQUARABLE = 1e9
# Eigenvalues of A below this share of the largest float32 does not see.
_VISIBLE = torch.finfo(torch.float32).eps ** 2
# How much of random vectors a start takes that goes on from a draft that was not good enough.
_STIR = 1e-3
# Sines between a column and those before it: from the first on a Gram matrix in float64 will do
# where a second round follows, for rounding leaves of orthogonality eps over its square or, in
# float32, eps over it; from the others on, one round.
_LEAST_SINE = 1e-5
_SOUND_SINE = {torch.float64: 1e-2, torch.float32: 1e-1}


def leading_pairs(
    half: Operator,
    back: Operator,
    start: Tensor,  # (*batch, m, block)
    rank: int,
    *,
    tolerance: float,
    least_gap: float,
    gain: float,
    far: bool = False,
    draft: tuple[Operator, Operator] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular pairs of `back`, by block Golub-Kahan iteration with restarts.

    It stops on an error of the wanted Ritz vectors that is estimated from the residuals A u − θ u
    of all Ritz vectors of the block, see `_error`. Within a cluster a subspace is as good as any
    other, so that small gaps do not count.

    Args:
        half: X (*batch, n, k) → (*batch, m, k), the transpose of `back`.
        back: Y (*batch, m, k) → (*batch, n, k).
        start: (*batch, m, block) random, block ≥ rank. The iteration starts from `back` of it,
            which costs half an application of A and saves a block.
        rank: how many are wanted.
        tolerance: the error of the subspace, as a sine, at which to stop.
        least_gap: smaller gaps count as this one.
        gain: what one more application of A is expected to take off the error of Ritz vectors; if
            it takes off less, a new start goes by that.
        far: whether the right singular vectors of `back` are wanted in place of the left ones.
        draft: half and back once more, for a first cycle in float32. What comes of it is measured
            with the float64 ones, and improved by them until it is good enough.

    Returns:
        U (*batch, n, rank), or (*batch, m, rank) if `far`, the singular values of `back`
        (*batch, rank) descending, and the error (*batch) estimated before the last application of
        A: above the tolerance where the iteration did not converge.

    Raises:
        DecompositionError: a product overflows.

    Source: Golub, Luk and Overton, "A block Lanczos method for computing the singular values and
    corresponding singular vectors of a matrix", ACM TOMS 1981; here with full reorthogonalisation.
    """
    begun = None
    if draft is not None:
        begun, reached = _bidiagonalized(
            *draft, _orthonormal(draft[1](start.float())), rank, 0, gain * tolerance, least_gap
        )
    drafted = begun is not None
    front = _orthonormal(back(start)) if begun is None else _orthonormal(begun.double())
    near = drafted
    for cycle in range(_MOST_CYCLES):
        if not near:
            if drafted and cycle == 1:
                # What the draft has missed altogether no iteration from it would find.
                front = _orthonormal(front + _STIR * _orthonormal(back(start)))
            options = (rank, cycle, gain * tolerance, least_gap)
            found, reached = _bidiagonalized(half, back, front, *options)
            if found is None:
                raise DecompositionError(_OUT_OF_RANGE)
            front = found
        # Ritz pairs of A on this subspace, and once more A on them.
        image = half(front)
        if not bool(image.isfinite().all()):
            raise DecompositionError(_OUT_OF_RANGE)
        right, triangle = torch.linalg.qr(image)
        turn, sigma = batched_svd(triangle.mT, exact=True)
        turned = back(right)
        applied = turned @ (triangle @ turn)
        error = _error(front @ turn, applied, sigma.square(), rank, least_gap)
        front, factor = torch.linalg.qr(turned)
        gain = min(gain, max(1.0, reached / max(float(error.max()), tolerance)))
        if bool(((error <= tolerance) | error.isnan()).all()):
            break
        # Once more A costs less than a new start. What a good draft is off by is rounding, and this
        # takes most of it off.
        first = not near or (drafted and cycle == 0)
        near = first and bool((error <= _NEAR * tolerance).all())
    if far:
        front, factor = torch.linalg.qr(half(front))
    left, values = batched_svd(factor, exact=True)
    return (front @ left)[..., :rank].contiguous(), values[..., :rank], error


def _bidiagonalized(
    half: Operator,
    back: Operator,
    front: Tensor,  # (*batch, n, block), orthonormal
    rank: int,
    cycle: int,
    tolerance: float,
    least_gap: float,
) -> tuple[Tensor | None, float]:
    """An orthonormal block, (*batch, n, block), of A applied to the leading Ritz vectors, and the
    error that these had; in the dtype of `front`. None where its range or precision does not do."""
    *batch, n, block = front.shape
    blocks = max(1, min(_MOST_BLOCKS, n // (2 * block)))
    look = min((_FIRST_LOOK if front.device.type == "cpu" else _FIRST_LOOK_GPU)[cycle > 0], blocks)
    # Orthonormal bases on both sides, and `back` of the far one; `half` of the near one is the far
    # one times a triangle. From images under A alone rounding would hide what is below √eps·σ₁.
    near, images = (front.new_empty(*batch, n, blocks * block) for _ in range(2))
    triangle = front.new_zeros(*batch, blocks * block, blocks * block)
    far, size, before = None, 0, float("inf")
    single = front.dtype == torch.float32
    while True:
        image = half(front)
        if far is None:
            far = image.new_empty(*batch, image.shape[-2], blocks * block)
        fresh = slice(size, size + block)
        beyond = _orthonormal(image, far[..., :size])
        near[..., fresh], far[..., fresh] = front, beyond
        size += block
        triangle[..., :size, fresh] = far[..., :size].mT @ image
        image = back(beyond)
        images[..., fresh] = image
        basis = near[..., :size]
        if not bool(image.isfinite().all()):
            return None, float("nan")
        if size == look * block:
            known = triangle[..., :size, :size]
            theta, turn = _ritz(known)
            if single and bool((theta[..., rank - 1] <= _VISIBLE * theta[..., 0]).any()):
                return None, float("nan")
            leading = turn[..., :block]
            applied = images[..., :size] @ (known @ leading)
            error = float(_error(basis @ leading, applied, theta, rank, least_gap).max())
            # What float32 cannot tell apart more blocks do not, either.
            stuck = single and not error <= before / 2
            if not error > tolerance or look == blocks or stuck:  # NaN ends it, too
                return _orthonormal(applied), error
            # A block takes off one to three orders of magnitude.
            before = error
            look = min(blocks, look + (1 if error < _NEAR * tolerance else 2))
        front = _orthonormal(image, basis)


def _ritz(triangle: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values θ, (*batch, k) descending, and the vectors' coordinates in the basis, of a
    triangle (*batch, k, k) whose singular values are the roots of θ."""
    # In float64 also in a draft: it is small, and an eigenproblem's error is eps times the largest.
    wide = triangle.double()
    theta, turn = torch.linalg.eigh(wide.mT @ wide)
    theta, turn = theta.flip(-1), turn.flip(-1)
    wanted = theta[..., : max(1, theta.shape[-1] // 4)]
    if not bool((wanted[..., -1] * _SQUARABLE > wanted[..., 0]).all()):
        _, sigma, right = torch.linalg.svd(wide)
        theta, turn = sigma.square(), right.mT
    return theta.to(triangle), turn.to(triangle)


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
    # Squared they leave float32's range.
    residual = (applied - ritz * theta[..., None, :block]).double().norm(dim=-2)
    theta = theta.double()
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


def _orthonormal(X: Tensor, basis: Tensor | None = None) -> Tensor:
    """Orthonormal columns, (*batch, n, k), that span X (*batch, n, k) or, given an orthonormal
    basis (*batch, n, j), what X adds to it."""
    length = torch.linalg.vector_norm(X, dim=-2)
    straight, sound = _straightened(X if basis is None else _without(basis, X), length)
    if sound:
        return straight
    # Twice is enough, also of an X that lies in the basis and leaves nothing but rounding.
    return _straightened(straight if basis is None else _without(basis, straight))[0]


def _without(basis: Tensor, X: Tensor) -> Tensor:
    inside = basis @ (basis.mT @ X)
    return torch.sub(X, inside, out=inside)


def _straightened(X: Tensor, length: Tensor | None = None) -> tuple[Tensor, bool]:
    """A basis of the columns of X (*batch, n, k), the closer to orthonormal the more X is, and
    whether it will do.

    By Cholesky, of which two rounds cost a fraction of a QR; by QR, and orthonormal, where a column
    lies too close to the span of those before it.

    Args:
        X: what is left of columns once their parts in a basis have been taken off.
        length: (*batch, k), norms of those columns, by which to tell what rounding has done.

    Source: Fukaya et al., "CholeskyQR2: a simple and communication-avoiding algorithm for computing
    a tall-skinny QR factorization on a large-scale parallel system", ScalA 2014.
    """
    wide = X.double()
    gram = wide.mT @ wide
    factor, info = torch.linalg.cholesky_ex(gram)
    distance = factor.diagonal(dim1=-2, dim2=-1)
    if length is None:
        length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    least = torch.where(info == 0, (distance / length).amin(-1), 0.0).amin()
    if not least > _LEAST_SINE:
        return torch.linalg.qr(X).Q, False
    eye = torch.eye(X.shape[-1], dtype=wide.dtype, device=X.device)
    inverse = torch.linalg.solve_triangular(factor.mT, eye, upper=True)
    return X @ inverse.to(X), bool(least > _SOUND_SINE[X.dtype])
