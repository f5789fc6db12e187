"""C + λI, with λ as a multiple of the mean diagonal of C."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.decomposition.operand import Operand
from corda_kernels.errors import ConfigError


def check_damping(damping: float | None) -> None:
    """Refuses a damping that is negative, infinite or NaN with a ConfigError."""
    if damping is not None and not 0 <= damping < float("inf"):
        raise ConfigError(f"damping must be at least 0 and finite, got {damping}")


def damped(covariance: Tensor, damping: float | None) -> tuple[Operand, Tensor]:
    """C + λI for C (*batch, in, in), and λ as a multiple of the mean diagonal of C, (*batch)."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    share = torch.full_like(mean, damping or 0.0)
    shift = (share * mean)[..., None, None] if damping else None
    return Operand(covariance, shift, symmetric=True), share
