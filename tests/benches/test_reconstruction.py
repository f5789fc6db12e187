"""The published reconstruction, through the inverse of C, beside the projection."""

from __future__ import annotations

import pytest
import torch
from pairs import pairwise
from reconstruction import through_inverse
from torch import Tensor

from corda_kernels.adapter import published_factors
from corda_kernels.errors import DecompositionError
from corda_kernels.linalg import co_svd

SHAPES = [(40, 64), (48, 48), (64, 40)]


def layer(shape: tuple[int, int], tokens: int, dead: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the covariance of some tokens with dead channels."""
    x = torch.randn(tokens, shape[1], dtype=torch.float64)
    x[:, shape[1] - dead :] = 0
    return torch.randn(shape, dtype=torch.float64), x.T @ x / tokens


@pairwise(shape=SHAPES, which=["largest", "smallest"], damping=[None, 0.01])
def test_it_is_the_projection_but_for_rounding(
    shape: tuple[int, int], which: str, damping: float | None
) -> None:
    W, C = layer(shape, 8 * shape[1])
    found = co_svd(W, C, rank=6, which=which, damping=damping)
    plain = published_factors(W, found)
    expected = plain.B @ plain.A
    product, taken = through_inverse(W, found, C)
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-11 * float(expected.norm()))
    assert not torch.equal(product, expected)
    assert taken == (damping or 0.0)


def test_what_cannot_be_inverted_is_damped() -> None:
    W, C = layer((40, 64), 512, dead=30)
    found = co_svd(W, C, rank=6)
    product, taken = through_inverse(W, found, C)
    assert 0 < taken < 1e-5
    # What C does not see has no part in Vᵀ.
    expected = found.U @ (found.U.T @ W) * (C.diagonal() > 0)
    assert float((product - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_components_that_vanish_are_finite(which: str) -> None:
    W, C = layer((40, 64), 1)
    product, _ = through_inverse(W, co_svd(W, C, rank=6, which=which), C.float())
    assert bool(torch.isfinite(product).all())


def test_a_covariance_of_nothing_is_refused() -> None:
    W, C = layer((40, 64), 512)
    with pytest.raises(DecompositionError, match=r"cannot be inverted.*64 channels are dead"):
        through_inverse(W, co_svd(W, C, rank=6), torch.zeros(64, 64))
