from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from corda_kernels.adapter import Adapter, AdapterFactors, AdapterRecord, LayerAdapter
from corda_kernels.adapter.record import initial_checksum


def factors(scaling: float = 0.5) -> AdapterFactors:
    """Of rank 2, for a weight 5 × 3."""
    return AdapterFactors(torch.randn(2, 3), torch.randn(5, 2), scaling)


def product(of: AdapterFactors) -> Tensor:
    return of.scaling * of.B.double() @ of.A.double()


def beside(trained: AdapterFactors, initial: AdapterFactors | None = None) -> LayerAdapter:
    return LayerAdapter(trained.A, trained.B, trained.scaling, initial)


def record() -> AdapterRecord:
    empty: dict[str, Any] = {"damping": None, "base": {}, "calibration": {}, "layers": {}}
    return AdapterRecord(mode="kpm", rank=2, hold=1.0, residual=None, **empty)


def test_the_change_of_a_plain_lora_is_all_of_it() -> None:
    layer = beside(factors())
    assert layer.change() is layer
    torch.testing.assert_close(layer.change().product(), product(layer).float())


def test_the_change_beside_a_residual_is_what_training_added() -> None:
    layer = beside(factors(), factors())
    assert layer.initial is not None
    expected = product(layer) - product(layer.initial)
    torch.testing.assert_close(layer.change().product(), expected.float())
    assert (layer.change().rank, layer.change().scaling) == (4, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_of_an_untrained_adapter_is_exactly_zero(dtype: torch.dtype) -> None:
    start = factors()
    layer = beside(start, start).to(dtype)
    assert not bool(layer.change().product().any())


def test_a_small_change_beside_a_residual_does_not_cancel() -> None:
    A, B = torch.randn(4, 64), torch.randn(64, 4)
    dA, dB = 1e-3 * torch.randn(4, 64), 1e-3 * torch.randn(64, 4)
    start, trained = AdapterFactors(A, B), AdapterFactors(A + dA, B + dB)
    expected = product(trained) - product(start)

    def error(narrow: AdapterFactors) -> float:
        return float((narrow.product() - expected).norm() / expected.norm())

    both = AdapterFactors(torch.cat([trained.A, A]), torch.cat([trained.B, -B], 1))
    change = beside(trained, start).change()
    assert error(change.to(torch.bfloat16)) < 0.005  # 0.003 measured
    assert error(both.to(torch.bfloat16)) > 0.5


def test_an_adapter_is_cast_as_a_whole() -> None:
    layer = beside(factors(), factors()).to(torch.float64)
    assert layer.initial is not None
    found = (layer.A, layer.B, layer.initial.A, layer.initial.B)
    assert {factor.dtype for factor in found} == {torch.float64}
    assert layer.scaling == layer.initial.scaling == 0.5
    assert beside(factors()).to(torch.float64).initial is None


def test_an_adapter_has_initial_factors_where_its_layers_do() -> None:
    start = factors()
    layers = {"a": beside(factors(), start)}
    assert Adapter(layers, record()).initial == {"a": start}
    assert Adapter({"a": beside(factors())}, record()).initial is None


def test_the_checksum_is_of_all_initial_factors() -> None:
    start = factors()
    checksum = initial_checksum({"a": start})
    assert initial_checksum({"a": copy.deepcopy(start)}) == checksum
    assert initial_checksum({"b": start}) != checksum
    assert initial_checksum({"a": AdapterFactors(start.A, start.B, 1.0)}) != checksum
    for changed in (start.A, start.B):
        changed[0, 0].neg_()
        assert initial_checksum({"a": start}) != checksum
        changed[0, 0].neg_()
    assert initial_checksum({"a": start}) == checksum
