"""Inverses of covariances by Cholesky factors, damped, and their extreme eigenvalues. Batched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corda_kernels.arguments import real_number, real_tensor
from corda_kernels.errors import DecompositionError
from corda_kernels.linalg.operand import Operator, check_damping
from corda_kernels.precision import without_autocast

# Without damping, with eps, 10·eps … of the mean diagonal: 2e-6 is the largest in float64.
_ATTEMPTS = 12
# Up to this size all eigenvalues cost little more than the extreme ones to the same accuracy.
_DENSE_SIZE = 2048
_LANCZOS_STEPS = 80
_LANCZOS_CHECK = 8
_LANCZOS_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class RegularizedInverse:
    """The inverse of C + λ·I, with the damping it needed.

    Attributes:
        inverse: (*batch, d, d), symmetric, in the dtype of C.
        damping: (*batch), λ of each matrix as a multiple of the mean of its diagonal; 0 if C itself
            could be inverted.
        attempts: (*batch) int64, number of factorisations that each matrix took.

    """

    inverse: Tensor
    damping: Tensor
    attempts: Tensor


@without_autocast()
@torch.no_grad()
def regularized_inverse(
    matrix: Tensor, *, damping: float | None = None, max_condition: float | None = None
) -> RegularizedInverse:
    """Inverts symmetric positive semi-definite matrices by Cholesky, each with its own damping.

    With `damping=None` a matrix is tried as it is, then with λ = eps times the mean of its
    diagonal, then with ten times as much and so on, until it can be factored and is conditioned
    well enough for its dtype. Matrices of a batch do not influence each other.


    Args:
        matrix: (*batch, d, d) float32 or float64; the lower triangle is read.
        damping: fixed λ as a multiple of the mean diagonal, or None for the least that works.
        max_condition: largest condition number that `damping=None` accepts; None for 0.1/eps of
            the dtype.


    Raises:
        ConfigError: damping or max_condition is out of range.
        DecompositionError: the matrices have another shape or dtype; or one holds NaN or Inf, or
            cannot be inverted within 12 attempts, or with the fixed damping.
    """
    check_damping(damping)
    if max_condition is not None:
        real_number("max_condition", max_condition, "at least 1", lambda x: x >= 1)
    flat = _flat(matrix)
    eps = torch.finfo(matrix.dtype).eps
    limit = 0.1 / eps if max_condition is None else max_condition
    mean_diagonal = flat.diagonal(dim1=-2, dim2=-1).mean(-1)
    share = torch.full_like(mean_diagonal, float(damping or 0.0))
    _require(torch.isfinite(flat.tril()).all(-1).all(-1), flat, share)

    attempts = torch.zeros_like(share, dtype=torch.int64)
    factor = torch.zeros_like(flat)
    done = torch.zeros_like(share, dtype=torch.bool)
    for attempt in range(_ATTEMPTS if damping is None else 1):
        pending = torch.nonzero(~done)[:, 0]
        if not pending.numel():
            break
        if attempt:
            share[pending] = eps * 10.0 ** (attempt - 1)
        shift = share[pending] * mean_diagonal[pending]
        candidate, good = _factor(flat[pending], shift)
        if damping is None:
            largest, smallest = _factored_extremes(flat[pending], shift, candidate)
            good &= largest <= limit * smallest
        attempts[pending] = attempt + 1
        factor[pending[good]] = candidate[good]
        done[pending] = good
    _require(done, flat, share)
    inverse = torch.cholesky_inverse(factor).reshape(matrix.shape)
    batch = matrix.shape[:-2]
    return RegularizedInverse(inverse, share.reshape(batch), attempts.reshape(batch))


@without_autocast()
@torch.no_grad()
def extreme_eigenvalues(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the smallest eigenvalue of symmetric positive definite matrices.

    Up to 2048 rows from all eigenvalues. Beyond, by Lanczos steps on C and, through its Cholesky
    factor, on C⁻¹, until the Ritz residual is 1e-4 of the eigenvalue, at most 80, which finds
    either within 1 %. In float32 the smallest also carries rounding of eps times the condition.

    Args:
        matrix: (*batch, d, d) float32 or float64; the lower triangle is read.

    Returns:
        (largest, smallest), each (*batch).

    Raises:
        DecompositionError: the matrices have another shape or dtype; or one is not positive
            definite to working precision.
    """
    flat = _flat(matrix)
    undamped = flat.new_zeros(flat.shape[0])
    if flat.shape[-1] <= _DENSE_SIZE:
        _require(flat.tril().sum((-2, -1)).isfinite(), flat, undamped)
        eigenvalues = torch.linalg.eigvalsh(flat)
        largest, smallest = eigenvalues[..., -1], eigenvalues[..., 0]
        good = smallest > torch.finfo(flat.dtype).eps * largest
    else:
        factor, good = _factor(flat, undamped)
        _require(good, flat, undamped)
        largest, smallest = _factored_extremes(flat, undamped, factor)
        good = smallest > 0
    _require(good, flat, undamped)
    return largest.reshape(matrix.shape[:-2]), smallest.reshape(matrix.shape[:-2])


def _flat(matrix: Tensor) -> Tensor:
    """Square matrices (*batch, d, d) of float32 or float64 as (b, d, d)."""
    real_tensor("matrix", matrix, DecompositionError)
    square = matrix.ndim > 1 and matrix.shape[-1] == matrix.shape[-2] > 0
    if not square or matrix.dtype not in (torch.float32, torch.float64):
        raise DecompositionError(
            "matrix must be (*batch, d, d) in float32 or float64, "
            f"got {tuple(matrix.shape)} in {matrix.dtype}"
        )
    return matrix.reshape(-1, *matrix.shape[-2:])


def _factor(flat: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of flat + shift·I, and which of them are sound."""
    damped = flat.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    factor, info = torch.linalg.cholesky_ex(damped)
    good = (info == 0) & torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(-1)
    # The identity stands in for a factor that failed, so that solves with it yield no NaN.
    eye = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
    return torch.where(good[:, None, None], factor, eye), good


def _factored_extremes(flat: Tensor, shift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """λmax and λmin of flat + shift·I, (b,) each, given its Cholesky factor."""
    lower = flat.tril()
    full = lower + lower.tril(-1).mT
    largest = _largest_by_lanczos(lambda x: full @ x + shift[:, None, None] * x, flat)
    return largest, 1 / _largest_by_lanczos(lambda x: torch.cholesky_solve(x, factor), flat)


def _largest_by_lanczos(apply: Operator, like: Tensor) -> Tensor:
    """The largest eigenvalue, (b,), of a symmetric operator on (b, d, 1) vectors."""
    d = like.shape[-1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(d, 1, dtype=torch.float64, generator=generator).to(like)
    basis = (start / start.norm()).expand(like.shape[0], d, 1)
    images = apply(basis)
    steps = min(_LANCZOS_STEPS, d)
    largest: Tensor
    for step in range(1, steps + 1):
        if step == steps or step % _LANCZOS_CHECK == 0:
            projected = basis.mT @ images
            eigenvalues, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
            largest = eigenvalues[..., -1]
            ritz = vectors[..., -1:]
            residual = images @ ritz - largest[..., None, None] * (basis @ ritz)
            converged = residual.norm(dim=(-2, -1)) <= _LANCZOS_TOLERANCE * largest
            if step == steps or bool(converged.all()):
                break
        direction = images[..., -1:]
        image_norm = direction.norm(dim=-2, keepdim=True)
        for _ in range(2):  # twice is enough for orthogonality to working precision
            direction = direction - basis @ (basis.mT @ direction)
        norm = direction.norm(dim=-2, keepdim=True)
        # Of an exhausted space nothing is left but rounding: a zero vector adds nothing.
        exhausted = norm <= 100 * torch.finfo(like.dtype).eps * image_norm
        direction = torch.where(exhausted, 0.0, direction / norm)
        basis = torch.cat([basis, direction], -1)
        images = torch.cat([images, apply(direction)], -1)
    return largest


def _require(good: Tensor, flat: Tensor, share: Tensor) -> None:
    """Refuses the first of the matrices, each with a damping, that is not good."""
    if bool(good.all()):
        return
    index = int(torch.nonzero(~good)[0])
    dead = int((flat[index].diagonal() == 0).sum())
    if not bool(torch.isfinite(flat[index]).all()):
        cause = "it holds NaN or Inf: check the calibration"
    elif dead:
        cause = f"{dead} channels are dead: leave them out, or use a fixed damping, such as 0.01"
    else:
        cause = "it was taken from too few tokens: use more, or a fixed damping, such as 0.01"
    raise DecompositionError(
        f"matrix {index} of the batch ({flat.shape[-1]} channels) cannot be inverted with a "
        f"damping of {float(share[index]):.1e} times its mean diagonal; likely cause: {cause}"
    )
