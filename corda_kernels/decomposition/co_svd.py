"""CO-SVD: one end of the spectrum of W·C, for one layer or a batch of one shape."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from corda_kernels.decomposition.subspace import Operator, leading_pairs
from corda_kernels.decomposition.triangle import lower_triangle, orthogonal_factor
from corda_kernels.decomposition.two_sided import (
    check_two_sided,
    input_root,
    oblique,
    output_root,
)
from corda_kernels.errors import (
    ConfigError,
    ConvergenceWarning,
    DecompositionError,
    RankError,
)
from corda_kernels.precision import without_autocast

End = Literal["largest", "smallest"]
Method = Literal["auto", "exact", "randomized"]

# A dense SVD costs as much as iterating at this size, and at fewer than six blocks of vectors
# (measured on a CPU: 192 channels 5 ms, 576 channels 86 ms against 25 to 45 ms).
_DENSE_SIZE = 256
_DENSE_BLOCKS = 6
# From this many blocks on, the factors are applied one after the other, first in float32: forming
# their product in float64 costs as much as six applications.
_FACTORED_BLOCKS = 12
# Errors of the subspace at which to stop, and gaps below which there is nothing to tell apart. What
# B A is off by in the end is a fifth of it or less at the top and a third at the bottom, for the
# error is that of the worst vector, estimated before the last application of the operator.
_TOLERANCE = {"largest": 2e-5, "smallest": 3e-3}
_LEAST_GAP = {"largest": 1e-3, "smallest": 1e-2}
# Vectors iterated with beyond those wanted, at least, and what their number is a multiple of: of
# 4096 × 4096 with 144 columns a product in float64 runs at 88 GFLOP/s, with 128 at 55, with 160 at
# 49, with 192 at 70 (2 cores with AVX-512).
_SPARE, _WIDTH = 16, 24
# What an application of the operator takes off the error, roughly, on layers of SmolLM2-135M.
_GAIN = {"largest": 3e1, "smallest": 3e1}


@dataclass(frozen=True, eq=False)
class CoSVD:
    """A part of the decomposition W·(C + λI)ᵖ = U Σ Vᵀ, in float64; p is 1 but for research.

    Attributes:
        U: (*batch, out, rank), left singular vectors: orthonormal or, given an output covariance D,
            with Uᵀ D U = I.
        S: (*batch, rank), their singular values, descending.
        damping: (*batch), λ as a multiple of the mean diagonal of C.
        residual: (*batch), what the iteration stopped at, 0 where the exact method ran: the largest
            error of a wanted vector, as a sine, estimated from Ritz residuals before the last
            application of M Mᵀ or, for the smallest, of its inverse.
        dual: (*batch, out, rank), D U where an output covariance D was given, otherwise None and U
            is its own dual. The part of W that belongs to the components is U dualᵀ W.
    """

    U: Tensor
    S: Tensor
    damping: Tensor
    residual: Tensor
    dual: Tensor | None = None


@torch.no_grad()
def co_svd(
    weight: Tensor,  # (*batch, out, in)
    covariance: Tensor,  # (*batch, in, in)
    *,
    rank: int,
    which: Literal["largest", "smallest"] = "largest",
    method: Literal["auto", "exact", "randomized"] = "auto",
    damping: float | None = None,
    generator: torch.Generator | None = None,
    output_covariance: Tensor | None = None,  # (*batch, out, out)
    power: float = 1.0,
) -> CoSVD:
    """Decomposes W·C and keeps the `rank` largest or smallest singular pairs.

    The result is that of float64: covariances of real models have conditions up to 1e10, so that in
    float32 the smallest vectors would be noise. Only the search for the largest of a large matrix
    begins in float32; what comes of that is measured, and corrected, in float64. Directions that C
    does not see at all (σ = 0) are ordered by what W does on them, the limit of a vanishing
    damping, by the exact method.

    For research, W·C may become D^½·W·C^power: with X = U dualᵀ W, which is U Uᵀ W without D, the
    largest leave the least ‖D^½ (W − X) C^power‖_F of all X of that rank, and the smallest are what
    the best approximation by all others leaves of W. With power 0.5 and no D, ‖(W − X) C^½‖² is
    the mean ‖Wx − Xx‖² over the inputs, with D weighted as D weights the outputs.

    Args:
        weight: (*batch, out, in), any floating dtype.
        covariance: (*batch, in, in), symmetric positive semi-definite, any floating dtype, on any
            device.
        rank: number of pairs, 1 … min(out, in).
        which: "largest" (IPM trains these) or "smallest" (KPM).
        method: "exact" for a dense SVD; "randomized" for an iteration, which falls back on the
            exact method with a ConvergenceWarning where it does not converge; "auto" picks by size.
        damping: λ as a multiple of the mean diagonal of C, and of D its own; None for none.
        generator: source of the random start; None for a fixed seed.
        output_covariance: D (*batch, out, out), symmetric positive definite once damped; None for
            the identity.
        power: of C, 1.0 or 0.5.

    Raises:
        ConfigError: an option has an unknown value.
        RankError: the rank is not possible for this shape.
        DecompositionError: shapes do not fit, an input holds NaN or Inf, D is singular, or C at
            power 0.5 has negative eigenvalues.

    Source: CorDA (arXiv:2406.05223), equation 2; for D and power, `decomposition/two_sided.py`.
    """
    check(weight, covariance, rank, which, method, damping)
    check_two_sided(weight, output_covariance, power)
    C, share = damped(covariance.to(weight.device), damping)
    right = C if power == 1.0 else input_root(C)
    if output_covariance is None:
        found = decompose(weight.double(), right, rank, which, method, generator)
        warn_given_up(found.given_up)
        return CoSVD(found.U, found.S, share, found.residual)
    P = output_root(damped(output_covariance.to(weight.device), damping)[0])
    found = decompose(P.mT @ weight.double(), right, rank, which, method, generator)
    warn_given_up(found.given_up)
    U, dual = oblique(found.U, P)
    return CoSVD(U, found.S, share, found.residual, dual)


def warn_given_up(error: Tensor, prefix: str = "") -> None:
    """Warns where the iteration gave up, at an error (*batch) that is 0 where it did not."""
    if bool((error != 0).any()):
        warnings.warn(
            f"{prefix}the randomised method did not converge (error {float(error.max()):.1e}): "
            "the exact one ran instead",
            ConvergenceWarning,
            stacklevel=4,
        )


def check(
    weight: Tensor,
    covariance: Tensor,
    rank: int,
    which: str,
    method: str,
    damping: float | None,
) -> None:
    """Refuses what `co_svd` cannot decompose; see there. The devices may differ."""
    if which not in ("largest", "smallest"):
        raise ConfigError(f'which must be "largest" or "smallest", got {which!r}')
    if method not in ("auto", "exact", "randomized"):
        raise ConfigError(f'method must be "auto", "exact" or "randomized", got {method!r}')
    if damping is not None and not 0 <= damping < float("inf"):
        raise ConfigError(f"damping must be at least 0 and finite, got {damping}")
    if weight.ndim < 2 or covariance.shape != (
        *weight.shape[:-2],
        weight.shape[-1],
        weight.shape[-1],
    ):
        raise DecompositionError(
            f"a weight {tuple(weight.shape)} needs a covariance (*batch, in, in), "
            f"got {tuple(covariance.shape)}"
        )
    if not 1 <= rank <= min(weight.shape[-2:]):
        raise RankError(
            f"rank {rank} is not possible for a weight of {weight.shape[-2]} × {weight.shape[-1]}: "
            f"it must be between 1 and {min(weight.shape[-2:])}"
        )
    for name, tensor in (("weight", weight), ("covariance", covariance)):
        # A finite sum is quick to see; only an infinite one can be an overflow.
        if not bool(tensor.sum().isfinite()) and not bool(torch.isfinite(tensor).all()):
            remedy = {
                "weight": "check the model's weights",
                "covariance": "calibrate again, in a wider dtype if activations overflowed",
            }[name]
            raise DecompositionError(f"the {name} holds NaN or Inf: {remedy}")


def damped(covariance: Tensor, damping: float | None) -> tuple[Tensor, Tensor]:
    """C + λI in float64, and λ as a multiple of the mean diagonal of C, (*batch)."""
    # A copy, also of what is float64 already.
    C = covariance.to(torch.float64, copy=True)
    diagonal = C.diagonal(dim1=-2, dim2=-1)
    share = torch.full_like(diagonal[..., 0], damping or 0.0)
    if damping:
        diagonal.add_(damping * diagonal.mean(-1, keepdim=True))
    return C, share


class Found(NamedTuple):
    """What `decompose` found.

    Attributes:
        U: (*batch, out, rank).
        S: (*batch, rank), descending.
        residual: (*batch), see `CoSVD`.
        given_up: (*batch), the error at which the iteration gave up, 0 where it did not.
    """

    U: Tensor
    S: Tensor
    residual: Tensor
    given_up: Tensor


@without_autocast()
def decompose(
    W: Tensor,  # (*batch, out, in)
    C: Tensor,  # (*batch, in, in)
    rank: int,
    which: End,
    method: Method,
    generator: torch.Generator | None,
) -> Found:
    """One end of the singular value decomposition of W·C, in float64; see `co_svd`."""
    lift = None
    if W.shape[-2] > W.shape[-1]:
        # Taken first, so that U lies in the range of W even where C is singular.
        lift, W = orthogonal_factor(W)
    shortest, block = W.shape[-2], _block(rank, W.shape[-2])
    dense = shortest <= _DENSE_SIZE or shortest < _DENSE_BLOCKS * block
    if method == "exact" or (method == "auto" and dense):
        U, S = _exact(W, C, rank, which)
        found = Found(U, S, torch.zeros_like(S[..., 0]), torch.zeros_like(S[..., 0]))
    else:
        found = _iterated(W, C, rank, which, generator)
    return found if lift is None else found._replace(U=lift(found.U))


def _block(rank: int, shortest: int) -> int:
    return min(-(-(rank + _SPARE) // _WIDTH) * _WIDTH, shortest)


def _exact(W: Tensor, C: Tensor, rank: int, which: End) -> tuple[Tensor, Tensor]:
    """U and S by a dense SVD of the triangular factor of W·C."""
    M = W @ C
    U, S, _ = torch.linalg.svd(torch.linalg.qr(M.mT, mode="r").R.mT)
    U = _order_null_block(W, U, S, S[..., 0] * _null_share(W))
    if which == "largest":
        return U[..., :rank], S[..., :rank]
    return U[..., -rank:], S[..., -rank:]


def _null_share(W: Tensor) -> float:
    """Singular values of W·C up to this share of the largest are zero to working precision."""
    return W.shape[-1] * torch.finfo(W.dtype).eps


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


def _iterated(
    W: Tensor, C: Tensor, rank: int, which: End, generator: torch.Generator | None
) -> Found:
    """By iteration, and by the exact method for those of a batch where that does not do."""
    if generator is None:
        generator = torch.Generator(W.device).manual_seed(0)
    n, block = W.shape[-2], _block(rank, W.shape[-2])
    # The same for all of a batch: what comes of a layer does not depend on its company.
    start = torch.randn(n, block, dtype=W.dtype, device=W.device, generator=generator)
    start = start.expand(*W.shape[:-2], n, block)
    options = {
        "tolerance": _TOLERANCE[which],
        "least_gap": _LEAST_GAP[which],
        "gain": _GAIN[which],
    }
    if which == "largest":
        if n > _FACTORED_BLOCKS * block:
            (half, back), draft = _factored(W, C), _factored(_single(W), _single(C))
        else:
            (half, back), draft = _multiplied(W @ C), None
        U, S, error = leading_pairs(half, back, start, rank, draft=draft, **options)
        largest = S[..., 0]
    else:
        M = W @ C
        half, back = _inverted(M)
        largest = torch.linalg.matrix_norm(M)
        U, inverse, error = leading_pairs(half, back, start, rank, draft=None, **options)
        U, S = U.flip(-1), 1 / inverse.flip(-1)
    # Of null directions the order is a question to W, not to M.
    null = (largest == 0) | (S[..., -1] <= largest * _null_share(W))
    lost = ~(error <= options["tolerance"])  # NaN has not converged either
    given_up = torch.where(lost & ~null, error, 0.0)
    for index in map(tuple, torch.nonzero(null | lost).tolist()):
        U[index], S[index] = _exact(W[index], C[index], rank, which)
        error[index] = 0
    return Found(U, S, error, given_up)


def _factored(W: Tensor, C: Tensor) -> tuple[Operator, Operator]:
    """Products with (W·C)ᵀ and W·C, factor by factor."""
    # C may be a root of a covariance, which is not symmetric.
    return lambda X: C.mT @ (W.mT @ X), lambda Y: W @ (C @ Y)


def _single(matrix: Tensor) -> Tensor:
    """In float32, scaled so that products of them neither overflow nor vanish."""
    single = matrix.float()
    largest = torch.linalg.vector_norm(single, torch.inf, (-2, -1), keepdim=True)
    return single.div_(largest.clamp_min(torch.finfo(torch.float32).tiny))


def _multiplied(M: Tensor) -> tuple[Operator, Operator]:
    """Products with Mᵀ and M."""
    return lambda X: M.mT @ X, lambda Y: M @ Y


def _inverted(M: Tensor) -> tuple[Operator, Operator]:
    """Products with L⁻¹ and L⁻ᵀ, L the triangular factor of M."""
    L = _floored(lower_triangle(M))
    return (
        lambda X: torch.linalg.solve_triangular(L, X, upper=False),
        lambda Y: torch.linalg.solve_triangular(L.mT, Y, upper=True),
    )


def _floored(L: Tensor) -> Tensor:
    """L with no diagonal entry below eps times the largest, so that it can be divided by."""
    diagonal = L.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.abs().amax(-1, keepdim=True)
    floor = torch.where(largest > 0, torch.finfo(L.dtype).eps * largest, 1.0)
    diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))
    return L
