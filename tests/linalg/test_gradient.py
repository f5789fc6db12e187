"""The steepest rows against a dense SVD of Ḡ C^-½, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corda_kernels.errors import DecompositionError, RankError
from corda_kernels.linalg import steepest_rows

RANK = 6


def log_spaced(rows: int, columns: int, digits: float) -> Tensor:
    d = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, d, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, d, dtype=torch.float64)).Q
    return left * torch.logspace(0, -digits, d, dtype=torch.float64) @ right.T


def spd(d: int, digits: float) -> Tensor:
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    C = (Q * torch.logspace(0, -digits, d, dtype=torch.float64)) @ Q.T
    return (C + C.T) / 2


@pytest.mark.parametrize("shape", [(30, 44), (44, 30), (400, 300), (300, 400)])
@pytest.mark.parametrize("whitened", [False, True])
def test_rows_are_those_of_a_dense_svd(shape: tuple[int, int], whitened: bool) -> None:
    out, channels = shape
    gradient, C = log_spaced(out, channels, 4), spd(channels, 6) if whitened else None
    method = "randomized" if out > 256 else "auto"
    A, S, _ = steepest_rows(gradient, C, rank=RANK, damping=0.01, method=method)
    root = torch.eye(channels, dtype=torch.float64)
    if C is not None:
        damped = C + 0.01 * C.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(damped)
        root = (vectors * values.rsqrt()) @ vectors.T  # the symmetric root, another than ours
    _, expected, V = torch.linalg.svd(gradient @ root)
    torch.testing.assert_close(S, expected[:RANK], rtol=1e-8, atol=0)
    rows = V[:RANK] @ root
    signs = (A * rows).sum(1, keepdim=True).sign()
    torch.testing.assert_close(signs * A, rows, rtol=0, atol=1e-4 * float(rows.abs().max()))


def test_what_has_no_such_rows_is_refused() -> None:
    gradient, C = log_spaced(20, 30, 2), spd(30, 2)
    with pytest.raises(RankError):
        steepest_rows(gradient, C, rank=21)
    with pytest.raises(DecompositionError, match=r"fewer than 6 directions"):
        steepest_rows(gradient[:1].expand(20, 30), None, rank=RANK)
    with pytest.raises(DecompositionError, match=r"fewer than 6 directions"):
        steepest_rows(torch.zeros(20, 30), None, rank=RANK)
    with pytest.raises(DecompositionError, match=r"30 channels\) is singular"):
        steepest_rows(gradient, torch.zeros(30, 30), rank=RANK)
    with pytest.raises(DecompositionError, match="NaN"):
        steepest_rows(gradient * torch.nan, None, rank=RANK)
