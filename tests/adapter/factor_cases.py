"""What tests of factors share: weights, covariances and their decompositions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from corda_kernels.adapter.factors import AdapterFactors
from corda_kernels.linalg import CoSVD, co_svd

RANK = 6
SHAPES = [(40, 64), (48, 48), (64, 40)]
ENDS = ["largest", "smallest"]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def of_tokens(n: int, channels: int, *, dead: int = 0) -> Tensor:
    x = random(n, channels)
    x[:, channels - dead :] = 0
    return x.T @ x / n


LAYERS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "well_conditioned": lambda out, c: (random(out, c), of_tokens(8 * c, c)),
    "dead_channels": lambda out, c: (random(out, c), of_tokens(8 * c, c, dead=30)),
    "single_token": lambda out, c: (random(out, c), of_tokens(1, c)),
    "low_rank_weight": lambda out, c: (random(out, 3) @ random(3, c), of_tokens(8 * c, c)),
    "zero_weight": lambda out, c: (torch.zeros(out, c, dtype=torch.float64), of_tokens(8 * c, c)),
    "zero_covariance": lambda out, c: (random(out, c), torch.zeros(c, c, dtype=torch.float64)),
}


all_ends = pytest.mark.parametrize("which", ENDS)


def layer(
    name: str, shape: tuple[int, int], which: str, rank: int = RANK
) -> tuple[Tensor, Tensor, CoSVD]:
    W, C = LAYERS[name](*shape)
    return W, C, co_svd(W, C, rank=rank, which=which)


def product(factors: AdapterFactors) -> Tensor:
    return factors.scaling * (factors.B @ factors.A)


def halves(factors: AdapterFactors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q, R and S of B = [P, Q], A = [R; S]."""
    P, Q = factors.B.chunk(2, 1)
    R, S = factors.A.chunk(2, 0)
    return P, Q, R, S


def span(rows: Tensor) -> Tensor:
    """The projection onto what the rows span."""
    Q = torch.linalg.qr(rows.mT).Q
    return Q @ Q.mT
