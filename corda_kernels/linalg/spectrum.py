"""All singular values of W·C, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.arguments import flag
from corda_kernels.linalg.co_svd import check
from corda_kernels.linalg.damping import damped
from corda_kernels.linalg.triangle import lower_gram, lower_triangle, orthogonal_factor
from corda_kernels.precision import without_autocast


@without_autocast()
@torch.no_grad()
def singular_values(
    weight: Tensor,  # (*batch, out, in)
    covariance: Tensor,  # (*batch, in, in)
    *,
    damping: float | None = None,
    tail: bool = True,
) -> Tensor:
    """The singular values of W·(C + λI), descending, in float64.

    Args:
        weight: (*batch, out, in), any floating dtype.
        covariance: (*batch, in, in), symmetric positive semi-definite, any floating dtype.
        damping: λ as a multiple of the mean diagonal of C; None for none.
        tail: whether the small ones matter, one by one. Without them the eigenvalues of the Gram
            matrix will do, at two thirds of the time: those below 1e-8 of the largest are then
            noise of that size, which a sum does not notice.

    Returns:
        (*batch, min(out, in)).

    Raises:
        ConfigError: the damping is out of range.
        DecompositionError: an input is no dense tensor of floating numbers, shapes do not fit, or
            an input holds NaN or Inf or leaves the range of float64.
    """
    check(weight, covariance, 1, "largest", "exact", damping)
    flag("tail", tail)
    C = damped(covariance.to(weight.device), damping)[0].double()
    W = weight.double()
    if not tail:
        M = W @ C
        gram = lower_gram(M if M.shape[-2] <= M.shape[-1] else M.mT)
        squares: Tensor = torch.linalg.eigvalsh(gram)
        return squares.flip(-1).clamp_min(0).sqrt()
    if W.shape[-2] > W.shape[-1]:
        W = orthogonal_factor(W)[1]
    values: Tensor = torch.linalg.svdvals(lower_triangle(W @ C))
    return values
