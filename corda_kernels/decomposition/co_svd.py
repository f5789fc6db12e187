"""CO-SVD: one end of the spectrum of W·C, for one layer or many of one shape."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corda_kernels.decomposition.subspace import bottom_subspace, top_subspace
from corda_kernels.errors import (
    ConfigError,
    ConvergenceWarning,
    DecompositionError,
    RankError,
)

# Up to this many rows or columns one dense SVD costs less than iterating (measured on a CPU).
EXACT_SIZE = 1024
_TOP_TOLERANCE = 1e-8
_BOTTOM_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class CoSVD:
    """A part of the decomposition W·(C + λI) = U Σ Vᵀ, in float64.

    Attributes:
        U: (*batch, out, rank), orthonormal left singular vectors.
        S: (*batch, rank), their singular values, descending.
        damping: (*batch), λ as a multiple of the mean diagonal of C.
        residual: (*batch), what the method's own stopping test reached: for the largest the Ritz
            residual ‖M Mᵀ u − σ² u‖/σ², for the smallest the relative fall of the tail's energy
            in the last step; 0 where the exact method ran.
    """

    U: Tensor
    S: Tensor
    damping: Tensor
    residual: Tensor


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
) -> CoSVD:
    """Decomposes W·C and keeps the `rank` largest or smallest singular pairs.

    All arithmetic is float64: covariances of real models have conditions up to 1e10, so that in
    float32 the smallest vectors would be noise. Directions that C does not see at all (σ = 0) are
    ordered by what W does on them, the limit of a vanishing damping, by the exact method.

    Args:
        weight: (*batch, out, in), any floating dtype.
        covariance: (*batch, in, in), symmetric positive semi-definite, any floating dtype.
        rank: number of pairs, 1 … min(out, in).
        which: "largest" (IPM trains these) or "smallest" (KPM).
        method: "exact" for a dense SVD; "randomized" for an iteration, which falls back on the
            exact method with a ConvergenceWarning where it does not converge; "auto" picks by size.
        damping: λ as a multiple of the mean diagonal of C; None for none.
        generator: source of the random start; None for a fixed seed.

    Raises:
        ConfigError: an option has an unknown value.
        RankError: the rank is not possible for this shape.
        DecompositionError: shapes do not fit, or an input holds NaN or Inf.

    Source: CorDA (arXiv:2406.05223), equation 2.
    """
    _check(weight, covariance, rank, which, method, damping)
    W = weight.double()
    lift = None
    if W.shape[-2] > W.shape[-1]:
        # Taken first, so that U lies in the range of W even where C is singular.
        lift, W = torch.linalg.qr(W)
    M, share = _product(W, covariance.double(), damping)
    shortest = M.shape[-2]
    if method == "auto":
        method = "exact" if shortest <= EXACT_SIZE or 4 * rank > shortest else "randomized"
    found = _randomized(M, rank, which, generator) if method == "randomized" else None
    U, S, residual = _exact(W, M, rank, which) if found is None else found
    return CoSVD(U if lift is None else lift @ U, S, share, residual)


def _check(
    weight: Tensor,
    covariance: Tensor,
    rank: int,
    which: str,
    method: str,
    damping: float | None,
) -> None:
    if which not in ("largest", "smallest"):
        raise ConfigError(f'which must be "largest" or "smallest", got {which!r}')
    if method not in ("auto", "exact", "randomized"):
        raise ConfigError(f'method must be "auto", "exact" or "randomized", got {method!r}')
    if damping is not None and not 0 <= damping < float("inf"):
        raise ConfigError(f"damping must be at least 0 and finite, got {damping}")
    if (
        weight.ndim < 2
        or covariance.shape != (*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
        or weight.device != covariance.device
    ):
        raise DecompositionError(
            f"a weight {tuple(weight.shape)} on {weight.device} needs a covariance (*batch, in, in)"
            f" beside it, got {tuple(covariance.shape)} on {covariance.device}"
        )
    if not 1 <= rank <= min(weight.shape[-2:]):
        raise RankError(
            f"rank {rank} is not possible for a weight of {weight.shape[-2]} × {weight.shape[-1]}: "
            f"it must be between 1 and {min(weight.shape[-2:])}"
        )
    for name, tensor in (("weight", weight), ("covariance", covariance)):
        if not bool(torch.isfinite(tensor).all()):
            raise DecompositionError(f"the {name} holds NaN or Inf: check the model's weights")


def _product(W: Tensor, C: Tensor, damping: float | None) -> tuple[Tensor, Tensor]:
    """M = W(C + λI) and λ as a multiple of the mean diagonal of C, (*batch)."""
    mean_diagonal = C.diagonal(dim1=-2, dim2=-1).mean(-1)
    share = torch.full_like(mean_diagonal, damping or 0.0)
    M = W @ C
    if damping:
        M = M + (damping * mean_diagonal)[..., None, None] * W
    return M, share


def _exact(W: Tensor, M: Tensor, rank: int, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and a zero residual by a dense SVD of the triangular factor of M."""
    U, S, _ = torch.linalg.svd(_triangle(M))
    exact = torch.zeros_like(S[..., 0])
    U = _order_null_block(W, U, S, _null_level(M, S[..., 0]))
    if which == "largest":
        return U[..., :rank], S[..., :rank], exact
    return U[..., -rank:], S[..., -rank:], exact


def _triangle(M: Tensor) -> Tensor:
    """L lower triangular with M Mᵀ = L Lᵀ: the singular pairs of M on the left are those of L."""
    R: Tensor = torch.linalg.qr(M.mT, mode="r").R
    return R.mT


def _null_level(M: Tensor, largest: Tensor) -> Tensor:
    """Singular values of M up to this one, (*batch), are zero to working precision."""
    return largest * (M.shape[-1] * torch.finfo(M.dtype).eps)


def _order_null_block(W: Tensor, U: Tensor, S: Tensor, level: Tensor) -> Tensor:
    """Turns the vectors of σ = 0 among themselves into the limit that a damping λ → 0 gives.

    On them M = λW, so that they are the singular vectors of NᵀW, N the block of those vectors.
    """
    count = (level[..., None] >= S).sum(-1)
    if not bool(count.any()):
        return U
    ordered = U.clone()
    for index in torch.nonzero(count.reshape(-1)).squeeze(1).tolist():
        # reshape of a contiguous clone is a view: writing to it writes to `ordered`.
        vectors = ordered.view(-1, *U.shape[-2:])[index]
        null = vectors[:, -int(count.reshape(-1)[index]) :]
        inside = null.mT @ W.reshape(-1, *W.shape[-2:])[index]
        null.copy_(null @ torch.linalg.svd(inside, full_matrices=False).U)
    return ordered


def _randomized(
    M: Tensor, rank: int, which: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """U, S and residual by iteration; None where the exact method has to take over."""
    if generator is None:
        generator = torch.Generator(M.device).manual_seed(0)
    shortest = M.shape[-2]
    norm = torch.linalg.matrix_norm(M)
    if bool((norm == 0).any()):
        return None
    if which == "largest":
        tolerance = _TOP_TOLERANCE
        columns = min(rank + max(16, rank // 2), shortest)
        U, S, residual = top_subspace(
            lambda X: M @ X,
            lambda Y: M.mT @ Y,
            _random(M, M.shape[-1], columns, generator),
            rank,
            tolerance=tolerance,
        )
    else:
        tolerance = _BOTTOM_TOLERANCE
        columns = min(rank + max(32, rank), shortest)
        start = _random(M, shortest, columns, generator)
        U, S, residual = bottom_subspace(_triangle(M), start, rank, tolerance=tolerance)
    # The order of null directions is a question to W, not to M.
    if bool((S[..., -1] <= _null_level(M, norm)).any()):
        return None
    worst = float(residual.max())
    if not worst <= tolerance:  # NaN has not converged either
        warnings.warn(
            f"the randomised method stopped at a residual of {worst:.1e}, short of {tolerance:.0e}:"
            " the exact one runs instead",
            ConvergenceWarning,
            stacklevel=4,
        )
        return None
    return U, S, residual


def _random(M: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(
        *M.shape[:-2], rows, columns, dtype=M.dtype, device=M.device, generator=generator
    )
