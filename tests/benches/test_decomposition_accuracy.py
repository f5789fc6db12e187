from __future__ import annotations

import math

import pytest
import torch
from decomposition_accuracy import bottom_gap
from svd_cases import Reference


def diagonal(values: list[float]) -> Reference:
    S = torch.tensor(values, dtype=torch.float64)
    identity = torch.eye(len(values), dtype=torch.float64)
    return Reference(identity, torch.diag(S), identity, S)


def test_the_gap_is_behind_the_smallest_that_are_wanted() -> None:
    exact = diagonal([8.0, 4.0, 2.0, 1.0])
    assert bottom_gap(exact, 1) == pytest.approx(1.0)
    assert bottom_gap(exact, 4) == math.inf
    null = diagonal([1.0, 0.5, 0.0, 0.0])
    assert bottom_gap(null, 2) == math.inf
    assert math.isnan(bottom_gap(null, 1))
