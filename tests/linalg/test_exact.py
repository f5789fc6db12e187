from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corda_kernels.linalg import exact


def conditioned(rows: int, columns: int, digits: float) -> Tensor:
    torch.manual_seed(0)
    n = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, n, dtype=torch.float64)).Q for size in (rows, columns)
    )
    return (left * torch.logspace(0, -digits, n, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("shape", [(30, 30), (30, 100), (1, 5)])
@pytest.mark.parametrize("digits", [1, 2.5, 8])
def test_the_triangle_has_the_singular_values_of_the_matrix(
    shape: tuple[int, int], digits: float
) -> None:
    M = torch.stack([conditioned(*shape, digits), conditioned(*shape, 1)])
    L = exact.lower_triangle(M)
    assert torch.equal(L, L.tril())
    torch.testing.assert_close(L @ L.mT, M @ M.mT)
    singular = torch.linalg.svdvals(M)
    torch.testing.assert_close(torch.linalg.svdvals(L), singular, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(40, 30), (100, 30), (5, 1)])
@pytest.mark.parametrize("digits", [1, 2.5, 8])
def test_the_orthogonal_factor_is_one(shape: tuple[int, int], digits: float) -> None:
    W = torch.stack([conditioned(*shape, digits), conditioned(*shape, 1)])
    lift, R = exact.no_taller(W)
    identity = torch.eye(shape[1], dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(lift(identity) @ R, W, rtol=0, atol=1e-9)
    X = torch.linalg.qr(torch.randn(2, shape[1], min(3, shape[1]), dtype=torch.float64)).Q
    lifted = lift(X)
    eye = torch.eye(X.shape[-1], dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(lifted.mT @ lifted, eye, rtol=0, atol=1e-9)


def test_the_gram_matrix_is_left_where_it_would_cost_accuracy() -> None:
    assert exact._gram_factor(conditioned(30, 100, 1)) is not None
    assert exact._gram_factor(conditioned(30, 100, 8)) is None
    assert exact._gram_factor(torch.zeros(3, 9).double()) is None
