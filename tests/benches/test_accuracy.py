from __future__ import annotations

import pytest
import torch
from svd_cases import (
    EPS,
    Reference,
    adapter_error,
    reference,
    tail_energy_ratio,
)
from torch import Tensor


def matrices(out: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(out, width, generator=generator)
    X = torch.randn(width, 2 * width, dtype=torch.float64, generator=generator)
    scales = torch.logspace(0, -2, width, dtype=torch.float64)[:, None]
    return W, ((scales * X) @ (scales * X).mT).float()


def diagonal(values: list[float]) -> Reference:
    S = torch.tensor(values, dtype=torch.float64)
    identity = torch.eye(len(values), dtype=torch.float64)
    return Reference(identity, torch.diag(S), identity, S)


@pytest.mark.parametrize("shape", [(6, 9), (12, 9)], ids=str)
def test_the_reference_is_the_svd_of_the_damped_product(shape: tuple[int, int]) -> None:
    W, C = matrices(*shape)
    exact = reference(W, C, 0.01)
    mean = float(C.double().diagonal().mean())
    M = W.double() @ (C.double() + 0.01 * mean * torch.eye(9, dtype=torch.float64))
    assert torch.allclose(exact.M, M, rtol=1e-12)
    torch.testing.assert_close(exact.S, torch.linalg.svdvals(M), rtol=1e-9, atol=0)
    torch.testing.assert_close(exact.U.mT @ exact.U, torch.eye(min(shape), dtype=torch.float64))
    norms = (exact.U.mT @ M).norm(dim=1)
    torch.testing.assert_close(norms, exact.S, rtol=1e-9, atol=0)


def test_errors_of_the_adapter_are_relative_and_of_the_end_asked_for() -> None:
    exact = reference(*matrices(8, 8), None)
    for which, U in (("largest", exact.U[:, :3]), ("smallest", exact.U[:, -3:])):
        right = U @ (U.mT @ exact.W)
        assert adapter_error(right, exact, which, 3) < 1e-14
        assert adapter_error(1.01 * right, exact, which, 3) == pytest.approx(0.01)
    assert adapter_error(right, exact, "largest", 3) > 0.5


def test_the_tail_energy_of_the_wrong_components_is_above_the_least() -> None:
    exact = diagonal([8.0, 4.0, 2.0, 1.0])
    assert tail_energy_ratio(exact.U[:, -2:], exact) == pytest.approx(1.0)
    assert tail_energy_ratio(exact.U[:, 1:3], exact) == pytest.approx(2.0)


def test_energy_at_rounding_level_counts_as_none() -> None:
    exact = diagonal([1.0, 0.5, 0.0, 0.0])
    level = 4 * EPS
    tilted = exact.U[:, -1:] + 0.9 * level * exact.U[:, :1]
    assert tail_energy_ratio(tilted, exact) == 1.0
    worse = exact.U[:, -1:] + 100 * level * exact.U[:, :1]
    assert tail_energy_ratio(worse, exact) == pytest.approx(100)
