from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from corda_kernels.decomposition import singular_values
from corda_kernels.errors import ConfigError, DecompositionError

SHAPES = {"wide": (12, 30), "square": (20, 20), "tall": (30, 12)}


def ill_conditioned(d: int, smallest: float) -> Tensor:
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return (turn * torch.logspace(0, math.log10(smallest), d, dtype=torch.float64)) @ turn.mT


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_they_are_those_of_the_product(
    shape: tuple[int, int], damping: float | None, tail: bool
) -> None:
    weight = torch.randn(2, 3, *shape)
    C = torch.stack([ill_conditioned(shape[1], 1e-2) for _ in range(6)])
    C = C.view(2, 3, shape[1], shape[1])
    mean = C.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped = C + (damping or 0) * mean * torch.eye(shape[1], dtype=torch.float64)
    found = singular_values(weight, C, damping=damping, tail=tail)
    torch.testing.assert_close(
        found, torch.linalg.svdvals(weight.double() @ damped), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_smallest_are_right(shape: tuple[int, int]) -> None:
    weight = torch.eye(*shape, dtype=torch.float64)
    C = torch.diag(torch.logspace(0, -14, shape[1], dtype=torch.float64))
    expected = C.diagonal()[: min(shape)]
    torch.testing.assert_close(singular_values(weight, C), expected, rtol=1e-3, atol=0)
    rough = singular_values(weight, C, tail=False)
    torch.testing.assert_close(rough, expected, rtol=0, atol=3e-8)
    assert float(rough[-1]) >= 0


@pytest.mark.parametrize("tail", [True, False])
def test_what_cannot_be_decomposed_is_refused(tail: bool) -> None:
    weight, C = torch.randn(4, 6), torch.eye(6)
    with pytest.raises(DecompositionError, match="needs a covariance"):
        singular_values(weight, torch.eye(5), tail=tail)
    with pytest.raises(ConfigError, match="damping"):
        singular_values(weight, C, damping=-1, tail=tail)
    C[0, 0] = math.nan
    with pytest.raises(DecompositionError, match="covariance holds NaN"):
        singular_values(weight, C, tail=tail)
