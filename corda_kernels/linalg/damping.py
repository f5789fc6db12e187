"""C + λI, with λ as a multiple of the mean diagonal of C."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.arguments import real_number
from corda_kernels.linalg.operand import Operand

# Beside a larger one nothing is left of C in float64.
_MOST = 1 / torch.finfo(torch.float64).eps


def check_damping(damping: float | None) -> None:
    """Refuses what is no damping.

    Raises:
        ConfigError: it is no number, negative, NaN, or so large that nothing would be left of C.
    """
    if damping is not None:
        rule = "at least 0 and finite, and no larger than 4.5e15"
        real_number("damping", damping, rule, lambda x: 0 <= x <= _MOST)


def damped(covariance: Tensor, damping: float | None) -> tuple[Operand, Tensor]:
    """C + λI for C (*batch, in, in), and λ as a multiple of the mean diagonal of C, (*batch)."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    share = torch.full_like(mean, float(damping or 0.0))
    shift = (share * mean)[..., None, None] if damping else None
    return Operand(covariance, shift, symmetric=True), share
