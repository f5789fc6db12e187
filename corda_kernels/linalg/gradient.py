"""Directions in which a gradient is steepest, per unit of change in the norm of a covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.arguments import real_tensor, seed_number, whole_number
from corda_kernels.errors import DecompositionError, RankError
from corda_kernels.linalg.context_svd import Method, check, decompose, factored, warn_given_up
from corda_kernels.linalg.operand import Operand, check_entries, damped
from corda_kernels.precision import without_autocast


@without_autocast()
@torch.no_grad()
def steepest_rows(
    gradient: Tensor,  # (out, in)
    covariance: Tensor | None,  # (in, in)
    *,
    rank: int,
    damping: float | None = None,
    method: Method = "auto",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows V_rᵀ C^-½ of the largest singular pairs U Σ Vᵀ of Ḡ C^-½.

    Of all changes ΔW = B A of that rank with tr(ΔW C ΔWᵀ) = 1, those with these rows in A take off
    most of a loss whose gradient is Ḡ. Which root of C is taken does not matter. An iteration finds
    the left singular vectors of Ḡ G⁻ᵀ, G Gᵀ = C, by products with either factor, and one more
    application of its transpose the right ones; what is dense here costs no more than a few
    triangular solves of (in, in).

    Args:
        gradient: Ḡ (out, in), any floating dtype.
        covariance: C (in, in), symmetric positive definite once damped; None for the identity.
        rank: number of rows, 1 … min(out, in).
        damping: λ as a multiple of the mean diagonal of C; None for none.
        method: see `co_svd`.
        seed: of the random start.

    Returns:
        The rows (rank, in), by descending singular value, and these, (rank,), both in float64; and
        what the iteration stopped at, see `CoSVD`.

    Raises:
        ConfigError: an option has an unknown value.
        RankError: the rank is not possible for this shape.
        DecompositionError: an input is no dense tensor of floating numbers, shapes do not fit, an
            input holds NaN or Inf, the gradient has fewer directions than that, or C is singular.
    """
    seed_number("seed", seed)
    if covariance is None:
        real_tensor("the gradient", gradient, DecompositionError)
        check_entries("gradient", gradient, "check the model's weights")
        whole_number("the rank", rank, 1, min(gradient.shape), error=RankError)
        K = torch.eye(gradient.shape[-1], device=gradient.device, dtype=torch.float64)
    else:
        check(gradient, covariance, rank, "largest", method, damping)
        C = damped(covariance.to(gradient.device), damping).double()
        G = factored(C, f"a covariance ({len(C)} channels)")
        K = torch.linalg.solve_triangular(G, torch.eye(len(C)).to(G), upper=False).mT
    found, given_up = decompose(gradient, Operand(K), rank, "largest", method, seed)
    warn_given_up(given_up)
    if float(found.S[-1]) <= len(K) * torch.finfo(torch.float64).eps * float(found.S[0]):
        raise DecompositionError(
            f"a gradient {tuple(gradient.shape)} has fewer than {rank} directions, from too few "
            "tokens with a loss: use more text or a smaller rank, or leave the layer out"
        )
    V = torch.linalg.qr(K.mT @ (gradient.double().mT @ found.U)).Q
    return (K @ V).mT.contiguous(), found.S, found.residual
