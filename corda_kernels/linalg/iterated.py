"""One end of the spectrum of W·C by iteration, in float32 first where that will do for a draft."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corda_kernels.linalg.exact import no_taller, null_share
from corda_kernels.linalg.inverted import InverseOfFactors, inverse_of_product
from corda_kernels.linalg.operand import Operand
from corda_kernels.linalg.subspace import Operator, leading_pairs

# Errors of the subspace at which to stop. What B A is off by in the end is a fifth of it or less at
# the top and a third at the bottom, for the error is that of the worst vector, estimated before the
# last application of the operator.
TOLERANCE = {"largest": 2e-5, "smallest": 3e-3}
# Gaps below which there is nothing to tell apart.
_LEAST_GAP = {"largest": 1e-3, "smallest": 1e-2}
# What an application of the operator takes off the error, roughly, on layers of SmolLM2-135M.
_GAIN = 3e1
# Vectors iterated with beyond those wanted, at least, and what their number is a multiple of: of
# 4096 × 4096 with 144 columns a product in float64 runs at 88 GFLOP/s, with 128 at 55, with 160 at
# 49, with 192 at 70 (2 cores with AVX-512).
_SPARE, _WIDTH = 16, 24
# From this many blocks on, solving with the factors of W and C costs less than forming W·C.
_SOLVED_BLOCKS = 16
# Norms between these are right in float32: squares neither overflow nor vanish.
_SQUARABLE = (1e-12, 1e18)
# Steps of the power method to the size of W·C, by which to tell what is zero.
_POWER_STEPS = 4


class Pairs(NamedTuple):
    """What iterating towards one end of the spectrum gives.

    Attributes:
        U: (*batch, out, rank), orthonormal.
        S: (*batch, rank), descending.
        error: (*batch), see `leading_pairs`.
        largest: (*batch), about ‖W·C‖₂, by which to tell whether the smallest of S are zero.
    """

    U: Tensor
    S: Tensor
    error: Tensor
    largest: Tensor


def block_size(rank: int, shortest: int) -> int:
    """How many vectors are iterated with, for a matrix whose shorter side is `shortest`."""
    return min(-(-(rank + _SPARE) // _WIDTH) * _WIDTH, shortest)


def top(W: Tensor, C: Operand, rank: int, generator: torch.Generator) -> Pairs:
    """The largest, of W (*batch, out, in), any floating dtype, and C (*batch, in, in)."""
    half, back = _factored(Operand(W), C)
    draft = _factored(Operand(W).single(), C.single())
    # The basis grows on the shorter side.
    tall = W.shape[-2] > W.shape[-1]
    if tall:
        half, back, draft = back, half, draft[::-1]
    U, S, error = leading_pairs(
        half,
        back,
        _start(max(W.shape[-2:]), rank, W, generator),
        rank,
        tolerance=TOLERANCE["largest"],
        least_gap=_LEAST_GAP["largest"],
        gain=_GAIN,
        far=tall,
        draft=draft,
    )
    return Pairs(U, S, error, S[..., 0])


def bottom(W: Tensor, C: Operand, rank: int, generator: torch.Generator) -> Pairs:
    """The smallest, likewise."""
    # The left singular vectors of a tall W lie in its range.
    lift, R = no_taller(W.double())
    start = _start(R.shape[-2], rank, W, generator)
    factors = None
    if C.symmetric and R.shape[-2] == R.shape[-1] >= _SOLVED_BLOCKS * start.shape[-1]:
        upper = R.shape != W.shape
        # Overwritten: of a tall W the triangle that `lift` needs, of another perhaps W itself.
        own = R.clone() if upper or R.dtype == W.dtype else R
        factors = InverseOfFactors.of(own, C.double(copy=True), upper=upper)
    if factors is None:
        half, back = inverse_of_product(R @ C.double())
        draft = None
    else:
        half, back = factors.operators()
        draft = factors.single().operators()
    U, inverse, error = leading_pairs(
        half,
        back,
        start,
        rank,
        tolerance=TOLERANCE["smallest"],
        least_gap=_LEAST_GAP["smallest"],
        gain=_GAIN,
        draft=draft,
    )
    S = 1 / inverse.flip(-1)
    return Pairs(lift(U.flip(-1)), S, error, _size(W, C, S[..., -1], generator))


def _factored(W: Operand, C: Operand) -> tuple[Operator, Operator]:
    """Products with (W·C)ᵀ and W·C, factor by factor: that costs no more than forming W·C."""
    # A root of a covariance is not symmetric; a covariance is, and as it stands it is faster.
    C_transposed = C.times if C.symmetric else C.transposed_times
    return (
        lambda X: C_transposed(W.transposed_times(X)),
        lambda Y: W.times(C.times(Y)),
    )


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
    if bool(((norm > _SQUARABLE[0]) & (norm < _SQUARABLE[1])).all()):
        return norm.double()
    exact: Tensor = torch.linalg.vector_norm(matrix.double(), dim=(-2, -1))
    return exact
