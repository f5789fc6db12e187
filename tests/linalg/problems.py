"""Weights and covariances of every hard kind, and plain references of their decompositions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
RANK = 4
SHAPES = {"wide": (200, 280), "square": (240, 240), "tall": (280, 200)}
METHODS = ["exact", "randomized"]
ENDS = ["largest", "smallest"]
Problem = tuple[Tensor, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(random(rows, columns)).Q


def log_spaced(n: int, digits: float) -> Tensor:
    return torch.logspace(0, -digits, n, dtype=torch.float64)


def symmetric(eigenvalues: Tensor) -> Tensor:
    q = orthonormal(len(eigenvalues), len(eigenvalues))
    c = (q * eigenvalues) @ q.T
    return (c + c.T) / 2


def of_tokens(n: int, channels: int, *, outlier: float = 1.0, dead: int = 0) -> Tensor:
    x = random(n, channels)
    x[:, 3:4] *= outlier
    x[:, channels - dead :] = 0
    return x.T @ x / n


def planted(out: int, channels: int, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W = U diag(σ) Vᵀ C⁻¹ and C, so that W·C has the singular values σ and left vectors U."""
    C = symmetric(log_spaced(channels, 1))
    U, V = orthonormal(out, len(sigma)), orthonormal(channels, len(sigma))
    return torch.linalg.solve(C, (V * sigma) @ U.T).T, C, U


def steps(n: int) -> Tensor:
    """Three flat levels: RANK values of 1, then 1e-3, and RANK values of 1e-6."""
    counts = torch.tensor([RANK, n - 2 * RANK, RANK])
    return torch.tensor([1, 1e-3, 1e-6], dtype=torch.float64).repeat_interleave(counts)


def two_clusters(n: int) -> Tensor:
    return torch.linspace(1, 0.5, n).double() * torch.where(torch.arange(n) < n // 2, 1.0, 1e-6)


PROBLEMS: dict[str, Callable[[int, int], Problem]] = {
    "gaussian": lambda out, c: (random(out, c), of_tokens(4 * c, c)),
    "covariance_to_1e-12": lambda out, c: (random(out, c), symmetric(log_spaced(c, 12))),
    "product_to_1e-12": lambda out, c: planted(out, c, log_spaced(min(out, c), 12))[:2],
    "steps": lambda out, c: planted(out, c, steps(min(out, c)))[:2],
    "two_clusters": lambda out, c: planted(out, c, two_clusters(min(out, c)))[:2],
    "flat": lambda out, c: (
        (orthonormal(max(out, c), min(out, c)).T, 3 * torch.eye(c).double())
        if out < c
        else (orthonormal(out, c), 3 * torch.eye(c).double())
    ),
    "outlier_channel": lambda out, c: (random(out, c), of_tokens(4 * c, c, outlier=1e3)),
    "dead_channels": lambda out, c: (random(out, c), of_tokens(4 * c, c, dead=100)),
    "few_tokens": lambda out, c: (random(out, c), of_tokens(60, c)),
    "single_token": lambda out, c: (random(out, c), of_tokens(1, c)),
    "low_rank_weight": lambda out, c: (random(out, 9) @ random(9, c), of_tokens(4 * c, c)),
    "zero_weight": lambda out, c: (torch.zeros(out, c), of_tokens(4 * c, c)),
    "zero_covariance": lambda out, c: (random(out, c), torch.zeros(c, c)),
}
# Of these, an iteration leaves the smallest to the exact method: zero to working precision, or
# flat.
NULL = ["covariance_to_1e-12", "flat", "low_rank_weight", "zero_weight"]


# Of these, W·C leaves more than RANK directions on the left side unseen.
SINGULAR = ["dead_channels", "few_tokens", "single_token", "zero_covariance"]


@cache
def problem(name: str, shape: str) -> Problem:
    torch.manual_seed(0)
    return PROBLEMS[name](*SHAPES[shape])


@cache
def reference(name: str, shape: str) -> tuple[Tensor, Tensor]:
    """U and Σ of W·C by a plain SVD."""
    W, C = problem(name, shape)
    U, S, _ = torch.linalg.svd(W.double() @ C.double(), full_matrices=False)
    return U, S


def projection(U: Tensor, W: Tensor) -> Tensor:
    return U @ (U.mT @ W)


def difference(U: Tensor, V: Tensor, W: Tensor) -> float:
    """‖UUᵀW − VVᵀW‖/‖VVᵀW‖."""
    expected = projection(V, W.double())
    return float((projection(U, W.double()) - expected).norm() / expected.norm())


def is_orthonormal(U: Tensor) -> bool:
    eye = torch.eye(U.shape[-1], dtype=torch.float64)
    return float((U.mT @ U - eye).abs().max()) <= 1e-13
