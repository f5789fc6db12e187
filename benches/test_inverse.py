"""(C + λI)⁻¹ by `regularized_inverse` against torch.linalg.inv, which PEFT takes, and Cholesky.

The error is ‖(C + λI) X − I‖_F / √d, the product taken in float64, of the worst matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, Contest, Sized
from svd_cases import DAMPING, realistic_covariance
from torch import Tensor

from corda_kernels import regularized_inverse

# Matrices in a batch, channels of each.
CASES = [(1, 576), (1, 1536), (16, 192)]


def damped(C: Tensor) -> Tensor:
    """C + λI, λ relative to the mean diagonal of each matrix."""
    scale = C.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return C + DAMPING * scale * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)


def by_cholesky(C: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(C)))


INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "linalg.inv": lambda C: torch.linalg.inv(damped(C)),
    "cholesky_inverse": by_cholesky,
    "ours": lambda C: regularized_inverse(C, damping=DAMPING).inverse,
}


@pytest.mark.parametrize(("batch", "channels"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INVERSES)
def test_inverse(
    contest: Contest[Tensor],
    sized: Sized,
    name: str,
    dtype: torch.dtype,
    batch: int,
    channels: int,
) -> None:
    channels = sized(channels)
    generator = torch.Generator(DEVICE).manual_seed(0)
    C = torch.stack([realistic_covariance(channels, generator) for _ in range(batch)]).to(dtype)
    identity = torch.eye(channels, dtype=torch.float64, device=DEVICE)

    def error(found: Tensor) -> float:
        rest = damped(C.double()) @ found.double() - identity
        return float(rest.norm(dim=(-2, -1)).max()) / math.sqrt(channels)

    group = f"inverse {batch} × {channels} × {channels} {dtype}"
    contest(group, lambda: INVERSES[name](C), error)
