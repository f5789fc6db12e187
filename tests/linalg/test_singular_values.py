from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.linalg import singular_values

SHAPES = [(40, 40), (30, 90), (90, 30), (1, 5)]


def problem(out: int, channels: int, digits: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    W = torch.randn(2, out, channels, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
    C = (q * torch.logspace(0, -digits, channels, dtype=torch.float64)) @ q.T
    return W, ((C + C.T) / 2).expand(2, -1, -1)


@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_them_as_a_plain_svd_finds_them(
    shape: tuple[int, int], damping: float | None
) -> None:
    W, C = problem(*shape, 6)
    shift = (damping or 0) * C.diagonal(dim1=-2, dim2=-1).mean(-1)
    expected = torch.linalg.svdvals(W @ (C + shift[:, None, None] * torch.eye(shape[1])))
    found = singular_values(W, C, damping=damping)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_the_tail_is_right_one_by_one_or_not_at_all() -> None:
    W, C = problem(40, 40, 10)
    expected = torch.linalg.svdvals(W @ C)
    torch.testing.assert_close(singular_values(W, C), expected, rtol=1e-4, atol=0)
    rough = singular_values(W, C, tail=False)
    torch.testing.assert_close(rough, expected, rtol=1e-6, atol=1e-7 * float(expected.max()))
    torch.testing.assert_close(rough.sum(-1), expected.sum(-1), rtol=1e-6, atol=0)
    assert bool((rough.diff() <= 0).all())


@pytest.mark.parametrize("tail", [True, False])
def test_singular_inputs(tail: bool) -> None:
    W, C = problem(30, 90, 2)
    W[0], C = 0, torch.zeros_like(C)
    assert singular_values(W, C, tail=tail).abs().max() == 0


def test_bad_inputs_are_refused() -> None:
    W, C = problem(4, 6, 1)
    with pytest.raises(ConfigError, match="damping"):
        singular_values(W, C, damping=-1)
    with pytest.raises(DecompositionError, match="NaN"):
        singular_values(W * torch.nan, C)
    with pytest.raises(DecompositionError, match="needs a covariance"):
        singular_values(W[0], C)
