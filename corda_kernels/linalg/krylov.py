"""A few singular vectors at either end of the spectrum of W·C, by block Golub-Kahan iteration.

`top` and `bottom` are the two ends, in float32 first where that will do for a draft.

`leading_pairs` is the method, batched. It finds the leading eigenvectors of a symmetric operator
A = back ∘ half. With half = Mᵀ and back = M these are the left singular vectors of M for the
largest σ. With half = M⁻¹ and back = M⁻ᵀ, or those of a triangular factor of M, A is (M Mᵀ)⁻¹, and
they are those for the smallest. There U has to come from the left side: obtained from V as M·V/σ it
would carry the error of V multiplied by σ₁/σ. The arithmetic should be float64, but for a first
draft.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corda_kernels.errors import DecompositionError
from corda_kernels.kernels import batched_svd
from corda_kernels.linalg.exact import no_taller, null_share
from corda_kernels.linalg.operand import Operand
from corda_kernels.linalg.solves import Operators, inverse_of_factors, inverse_of_product

Found = tuple[Tensor, Tensor, Tensor, Tensor]  # see `top`


class Stop(NamedTuple):
    """When `leading_pairs` stops.

    Attributes:
        tolerance: the error of the subspace, as a sine.
        least_gap: smaller gaps count as this one, and there is nothing to tell apart.
        gain: what one more application of A is expected to take off the error of Ritz vectors; if
            it takes off less, a new start goes by that.
    """

    tolerance: float
    least_gap: float
    gain: float


# What B A is off by in the end is a fifth of the tolerance or less at the top and a third at the
# bottom, for the error is that of the worst vector, estimated before the last application of the
# operator. The gains are those on layers of SmolLM2-135M, roughly.
STOP = {"largest": Stop(2e-5, 1e-3, 3e1), "smallest": Stop(3e-3, 1e-2, 3e1)}
# Vectors iterated with beyond those wanted, at least, and what their number is a multiple of: of
# 4096 × 4096 with 144 columns a product in float64 runs at 88 GFLOP/s, with 128 at 55, with 160 at
# 49, with 192 at 70 (2 cores with AVX-512).
_SPARE, _WIDTH = 16, 24
# From this many blocks on, solving with the factors of W and C costs less than forming W·C.
_SOLVED_BLOCKS = 16
# Norms between these are right in float32: squares neither overflow nor vanish.
_NORMS = (1e-12, 1e18)
# Steps of the power method to the size of W·C, by which to tell what is zero.
_POWER_STEPS = 4

# Blocks of the basis at the first look at what has converged, in the first cycle and in later ones;
# on a CPU a look costs as much as a block, on a GPU as several. Blocks at which to start afresh;
# and how many starts there are, in float32 and in float64.
_FIRST_LOOK = (4, 2)
_FIRST_LOOK_GPU = (6, 3)
_MOST_BLOCKS = 12
_MOST_DRAFTS = 3
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


def block_size(rank: int, shortest: int) -> int:
    """How many vectors are iterated with, for a matrix whose shorter side is `shortest`."""
    return min(-(-(rank + _SPARE) // _WIDTH) * _WIDTH, shortest)


def top(W: Tensor, C: Operand, rank: int, generator: torch.Generator) -> Found:
    """The largest singular pairs of W·C.

    Args:
        W: (*batch, out, in), any floating dtype.
        C: (*batch, in, in).
        rank: how many.
        generator: source of the random start.

    Returns:
        U (*batch, out, rank), orthonormal; S (*batch, rank), descending; the error (*batch), see
        `leading_pairs`; and about ‖W·C‖₂, (*batch), by which to tell which of S are zero.
    """
    operators = _factored(Operand(W), C)
    draft = _factored(Operand(W).single(), C.single())
    # The basis grows on the shorter side.
    tall = W.shape[-2] > W.shape[-1]
    if tall:
        operators, draft = operators[::-1], draft[::-1]
    start = _start(max(W.shape[-2:]), rank, W, generator)
    U, S, error = leading_pairs(operators, start, rank, STOP["largest"], far=tall, draft=draft)
    return U, S, error, S[..., 0]


def bottom(W: Tensor, C: Operand, rank: int, generator: torch.Generator) -> Found:
    """The smallest, likewise."""
    # The left singular vectors of a tall W lie in its range.
    lift, R = no_taller(W.double())
    start = _start(R.shape[-2], rank, W, generator)
    solves = None
    if C.symmetric and R.shape[-2] == R.shape[-1] >= _SOLVED_BLOCKS * start.shape[-1]:
        upper = R.shape != W.shape
        # Overwritten: of a tall W the triangle that `lift` needs, of another perhaps W itself.
        own = R.clone() if upper or R.dtype == W.dtype else R
        solves = inverse_of_factors(own, C.double(copy=True), upper=upper)
    operators, draft = solves or (inverse_of_product(R @ C.double()), None)
    U, inverse, error = leading_pairs(operators, start, rank, STOP["smallest"], draft=draft)
    S = 1 / inverse.flip(-1)
    return lift(U.flip(-1)), S, error, _size(W, C, S[..., -1], generator)


def _factored(W: Operand, C: Operand) -> Operators:
    """Products with (W·C)ᵀ and W·C, factor by factor: that costs no more than forming W·C."""
    # A root of a covariance is not symmetric; a covariance is, and as it stands it is faster.
    C_transposed = C.times if C.symmetric else C.transposed_times
    return lambda X: C_transposed(W.transposed_times(X)), lambda Y: W.times(C.times(Y))


def _start(rows: int, rank: int, W: Tensor, generator: torch.Generator) -> Tensor:
    """Random columns (*batch, rows, block); the same for all of a batch, so that what comes of a
    layer does not depend on its company."""
    block = block_size(rank, min(W.shape[-2:]))
    start = torch.randn(rows, block, device=W.device, generator=generator).double()
    return start.expand(*W.shape[:-2], rows, block)


def _size(W: Tensor, C: Operand, smallest: Tensor, generator: torch.Generator) -> Tensor:
    """‖W·C‖₂, (*batch): an upper bound where that settles that the smallest is not zero, otherwise
    an estimate from below by the power method."""
    shift = 0.0 if C.shift is None else C.shift[..., 0, 0] * W.shape[-1] ** 0.5
    bound = _norm(W) * (_norm(C.matrix) + shift)
    if bool((smallest > bound * null_share(W)).all()):
        return bound
    half, back = _factored(Operand(W), C)
    X = _start(W.shape[-2], 1, W, generator)[..., :1]
    for _ in range(_POWER_STEPS):
        X = back(half(X))
        X /= torch.linalg.vector_norm(X, dim=-2, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    size: Tensor = torch.linalg.vector_norm(half(X), dim=(-2, -1))
    return size


def _norm(matrix: Tensor) -> Tensor:
    """‖matrix‖_F, (*batch), in float64."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=dtype)
    if not bool(((norm > _NORMS[0]) & (norm < _NORMS[1])).all()):
        norm = torch.linalg.vector_norm(matrix.double(), dim=(-2, -1))
    return norm.double()


def leading_pairs(
    operators: Operators,
    start: Tensor,  # (*batch, m, block)
    rank: int,
    stop: Stop,
    *,
    far: bool = False,
    draft: Operators | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular pairs of `back`, by block Golub-Kahan iteration with restarts.

    It stops on an error of the wanted Ritz vectors that is estimated from the residuals A u − θ u
    of all Ritz vectors of the block, see `_error`. Within a cluster a subspace is as good as any
    other, so that small gaps do not count.

    Args:
        operators: half, X (*batch, n, k) → (*batch, m, k), and back, Y (*batch, m, k) → (*batch,
            n, k), of which either is the transpose of the other.
        start: (*batch, m, block) random, block ≥ rank. The iteration starts from `back` of it,
            which costs half an application of A and saves a block.
        rank: how many are wanted.
        stop: when to stop.
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
    half, back = operators
    tolerance, least_gap, gain = stop
    found = None
    if draft is not None:
        found, reached = _drafted(draft, start, rank, stop)
    # Whether the block is near enough to be measured without iterating first.
    near = drafted = found is not None
    front = _orthonormal(back(start) if found is None else found.double())
    for cycle in range(_MOST_CYCLES):
        if not near:
            if drafted and cycle == 1:
                # What the draft has missed altogether no iteration from it would find.
                front = _orthonormal(front + _STIR * _orthonormal(back(start)))
            goal = gain * tolerance
            found, reached = _bidiagonalized(operators, front, rank, cycle, goal, least_gap)
            front = front if found is None else found
        # Ritz pairs of A on this subspace, and once more A on them.
        image = half(front)
        if found is None or not bool(image.isfinite().all()):
            raise DecompositionError(
                "W·C leaves the range of float64: scale the weight or covariance to sizes near 1"
            )
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


def _drafted(
    operators: Operators, start: Tensor, rank: int, stop: Stop
) -> tuple[Tensor | None, float]:
    """What `_bidiagonalized` makes of a random start in float32, begun anew while that helps."""
    front = _orthonormal(operators[1](start.float()))
    found, error, goal = None, float("inf"), stop.gain * stop.tolerance
    for cycle in range(_MOST_DRAFTS):
        better, reached = _bidiagonalized(operators, front, rank, cycle, goal, stop.least_gap)
        if better is None or not reached <= error / 2:  # NaN, too
            break
        front = found = better
        error = reached
        if error <= goal:
            break
        # Of a spectrum so flat one more application takes little off, and float64 costs twice.
        goal = stop.tolerance
    return found, error


def _bidiagonalized(
    operators: Operators, front: Tensor, rank: int, cycle: int, goal: float, least_gap: float
) -> tuple[Tensor | None, float]:
    """An orthonormal block, (*batch, n, block), of A applied to the leading Ritz vectors, and the
    error that these had; in the dtype of `front` (*batch, n, block), which is orthonormal. None
    where its range or precision does not do."""
    half, back = operators
    *batch, n, block = front.shape
    blocks = max(1, min(_MOST_BLOCKS, n // (2 * block)))
    look = min((_FIRST_LOOK if front.device.type == "cpu" else _FIRST_LOOK_GPU)[cycle > 0], blocks)
    single = front.dtype == torch.float32
    image = half(front)
    # Orthonormal bases on both sides, and `back` of the far one; `half` of the near one is the far
    # one times a triangle. From images under A alone rounding would hide what is below √eps·σ₁.
    near, images = (front.new_empty(*batch, n, blocks * block) for _ in range(2))
    far = image.new_empty(*batch, image.shape[-2], blocks * block)
    triangle = front.new_zeros(*batch, blocks * block, blocks * block)
    size, before = 0, float("inf")
    while True:
        fresh = slice(size, size + block)
        near[..., fresh] = front
        far[..., fresh] = beyond = _orthonormal(image, far[..., :size])
        size += block
        triangle[..., :size, fresh] = far[..., :size].mT @ image
        images[..., fresh] = image = back(beyond)
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
            # What float32 cannot tell apart more blocks do not, either. Beyond 1, as with the first
            # blocks where the spectrum is flat, an error says no more than that it is large.
            stuck = single and before < 1 and not error <= before / 2
            if not error > goal or look == blocks or stuck:  # NaN ends it, too
                return _orthonormal(applied), error
            # A block takes off one to three orders of magnitude.
            before = error
            look = min(blocks, look + (1 if error < _NEAR * goal else 2 if error < 1 else 4))
        front = _orthonormal(image, basis)
        image = half(front)


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


def _error(ritz: Tensor, applied: Tensor, theta: Tensor, rank: int, least_gap: float) -> Tensor:
    """The error of the wanted Ritz vectors as a sine, (*batch), estimated: that of the worst.

    Given the Ritz vectors of a block, (*batch, n, block), A of them, and at least so many Ritz
    values, (*batch, block …).

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
    basis (*batch, n, j), what X adds to it.

    By Cholesky, of which two rounds cost a fraction of a QR; by QR where a column lies too close to
    the span of those before it.

    Source: Fukaya et al., "CholeskyQR2: a simple and communication-avoiding algorithm for computing
    a tall-skinny QR factorization on a large-scale parallel system", ScalA 2014.
    """
    # Before the parts in the basis are taken off, by which to tell what rounding has done.
    length = torch.linalg.vector_norm(X, dim=-2)
    # Twice is enough, also of an X that lies in the basis and leaves nothing but rounding.
    for again in (False, True):
        if basis is not None:
            inside = basis @ (basis.mT @ X)
            X = torch.sub(X, inside, out=inside)
        wide = X.double()
        gram = wide.mT @ wide
        factor, info = torch.linalg.cholesky_ex(gram)
        if again:
            length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        sines = factor.diagonal(dim1=-2, dim2=-1) / length
        least = torch.where(info == 0, sines.amin(-1), 0.0).amin()
        if least > _LEAST_SINE:
            eye = torch.eye(X.shape[-1], dtype=wide.dtype, device=X.device)
            X = X @ torch.linalg.solve_triangular(factor.mT, eye, upper=True).to(X)
            if bool(least > _SOUND_SINE[X.dtype]):
                break
        else:  # NaN, too
            X = torch.linalg.qr(X).Q
    return X
