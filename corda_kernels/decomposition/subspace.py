"""Randomised methods for a few left singular vectors at either end of the spectrum, batched.

Both work on the left side alone: U obtained from V as M·V/σ would carry the error of V multiplied
by σ₁/σ. Everything is orthogonalised by Householder QR in the dtype given, which should be float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Steps until a method gives up. On layers of real models 4 … 8 steps suffice.
_MAX_STEPS = 12


def top_subspace(
    multiply: Callable[[Tensor], Tensor],
    multiply_transposed: Callable[[Tensor], Tensor],
    start: Tensor,  # (*batch, in, block)
    rank: int,
    *,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular pairs of an operator M (out, in) by block Krylov iteration.

    Args:
        multiply: X (*batch, in, k) → M X (*batch, out, k).
        multiply_transposed: Y (*batch, out, k) → Mᵀ Y (*batch, in, k).
        start: (*batch, in, block) random, block ≥ rank.
        rank: how many are wanted.
        tolerance: largest Ritz residual ‖M Mᵀ u − σ² u‖/σ² of a wanted pair at which to stop.

    Returns:
        U (*batch, out, rank), S (*batch, rank) descending, and the largest residual (*batch). The
        iteration also ends, with a larger residual, when its basis would outgrow half of the space
        or after 12 steps.

    Source: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
    singular value decomposition", NeurIPS 2015.
    """
    block = start.shape[-1]
    last = torch.linalg.qr(multiply(start)).Q
    basis = last
    images = multiply_transposed(last)
    for step in range(1, _MAX_STEPS + 1):
        triangle = torch.linalg.qr(images, mode="r").R
        left, sigma, _ = torch.linalg.svd(triangle.mT)
        following = multiply(images[..., -block:])
        coupling = torch.eye(block, dtype=following.dtype, device=following.device)
        # Where the space is exhausted QR fills up with arbitrary columns, which need the second
        # and third round to become orthogonal to the basis.
        for _ in range(3):
            following = following - basis @ (basis.mT @ following)
            following, factor = torch.linalg.qr(following)
            coupling = factor @ coupling
        last = following
        # M Mᵀ Q − Q (Qᵀ M Mᵀ Q) lies in the next block alone: on a Ritz vector Q x its norm is that
        # of the coupling applied to the last block of x.
        residuals = (coupling @ left[..., -block:, :rank]).norm(dim=-2)
        residual = (residuals / sigma[..., :rank].square().clamp_min(_tiny(sigma))).amax(-1)
        if bool((residual <= tolerance).all()):
            break
        if step == _MAX_STEPS or 2 * (basis.shape[-1] + block) > basis.shape[-2]:
            break
        basis = torch.cat([basis, last], -1)
        images = torch.cat([images, multiply_transposed(last)], -1)
    return basis @ left[..., :rank], sigma[..., :rank], residual


def bottom_subspace(
    triangle: Tensor,  # (*batch, n, n)
    start: Tensor,  # (*batch, n, block)
    rank: int,
    *,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest left singular pairs of lower triangular L by inverse subspace iteration.

    One step is X ← orth(L⁻ᵀ orth(L⁻¹ X)), which never squares the condition number. It stops on the
    energy ‖UᵀL‖² of the tail, since angles inside a flat tail mean nothing.

    Args:
        triangle: (*batch, n, n); diagonal entries below eps times the largest are floored.
        start: (*batch, n, block) random, block ≥ rank.
        rank: how many are wanted.
        tolerance: relative fall of the tail's energy in one step at which to stop.

    Returns:
        U (*batch, n, rank), S (*batch, rank) descending, and the last relative fall (*batch), which
        is larger than the tolerance if 12 steps did not do.
    """
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(triangle.dtype).eps * diagonal.abs().amax(-1, keepdim=True)
    floored = triangle.clone()
    floored.diagonal(dim1=-2, dim2=-1).copy_(
        torch.where(diagonal.abs() < floor, floor.clamp_min(_tiny(triangle)), diagonal)
    )

    vectors = torch.linalg.qr(start).Q
    energy = start.new_full(start.shape[:-2], torch.inf)
    for _ in range(_MAX_STEPS):
        right = torch.linalg.qr(torch.linalg.solve_triangular(floored, vectors, upper=False)).Q
        turned = torch.linalg.solve_triangular(floored.mT, right, upper=True)
        vectors, factor = torch.linalg.qr(turned)
        # Singular pairs of L⁻ᵀ on the subspace, the largest first; σ of L is one over them.
        left, values, _ = torch.linalg.svd(factor)
        vectors = vectors @ left
        sigma = 1 / values
        previous, energy = energy, sigma[..., :rank].square().sum(-1)
        fall = (previous - energy).abs() / energy.clamp_min(_tiny(energy))
        if bool((fall <= tolerance).all()):
            break
    return vectors[..., :rank].flip(-1), sigma[..., :rank].flip(-1), fall


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
