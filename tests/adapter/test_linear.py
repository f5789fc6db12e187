from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Calibrated, Logits, Make
from peft import PeftModel
from torch import nn

from corda_kernels import CordaLinear, export_lora, merge, save_adapter
from corda_kernels.adapter import AdapterFactors, adapter_of, read_adapter
from corda_kernels.linears import linear_weight

OPTIONS: list[dict[str, Any]] = [{}, {"hold": 8}, {"residual": "weight"}]
all_options = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "hold", "published"])


def corda_linears(model: nn.Module) -> dict[str, CordaLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, CordaLinear)}


def factors(rank: int = 4) -> AdapterFactors:
    return AdapterFactors(torch.randn(rank, 48), torch.randn(32, rank), 0.5)


@all_options
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_layer_adds_what_it_learnt(
    calibrated: Calibrated, adapt: Make, train: Make, architecture: str, options: dict[str, Any]
) -> None:
    plain, covariances = calibrated(architecture)
    start = copy.deepcopy(plain), covariances
    model = train(adapt(start, use_peft=False, **options))
    layers, changes = corda_linears(model), adapter_of(model).layers
    assert list(layers) == list(covariances)
    for name, layer in layers.items():
        x = torch.randn(2, 5, layer.A.shape[1])
        change = changes[name].change().product()
        assert bool(change.any())
        torch.testing.assert_close(layer(x), plain.get_submodule(name)(x) + x @ change.T)
        assert layer(x).shape == (2, 5, layer.B.shape[0])


def test_a_layer_starts_as_its_base_exactly(
    calibrated: Calibrated, adapt: Make, logits: Logits
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, covariances = calibrated()
        adapted = adapt((model.to(dtype), covariances), use_peft=False)
        assert torch.equal(logits(adapted), logits(calibrated()[0].to(dtype)))


def test_the_wrapped_layer_is_frozen_and_the_factors_are_its_own() -> None:
    given = factors()
    layer = CordaLinear(nn.Linear(48, 32), given)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    with torch.no_grad():
        layer.A.zero_()
    assert bool(given.A.any())
    assert CordaLinear(nn.Linear(48, 32), given, copy=False).A.data_ptr() == given.A.data_ptr()


def test_a_layers_gradients_are_those_of_the_weight_it_stands_for() -> None:
    given = factors()
    layer = CordaLinear(nn.Linear(48, 32), given)
    A, B = given.A.clone().requires_grad_(), given.B.clone().requires_grad_()
    x = torch.randn(7, 48)
    layer(x).square().sum().backward()
    weight = layer.base.weight + 0.5 * B @ A
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.A.grad, A.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.B.grad, B.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_in_float32_on_a_narrow_base(
    calibrated: Calibrated, adapt: Make, dtype: torch.dtype
) -> None:
    model, covariances = calibrated()
    model = adapt((model.to(dtype), covariances), use_peft=False)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.A.dtype == layer.B.dtype == torch.float32
    x = torch.randn(3, 48).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), layer.base(x))


def test_nothing_but_the_factors_is_trained(
    calibrated: Calibrated, adapt: Make, train: Make
) -> None:
    model, covariances = calibrated()
    model = adapt((model, covariances), use_peft=False)
    before = copy.deepcopy(model.state_dict())
    train(model)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {f"{name}.{factor}" for name in covariances for factor in "AB"}


def test_a_merge_gives_the_models_layers_back(calibrated: Calibrated, adapt: Make) -> None:
    plain, covariances = calibrated("gpt2")
    before = {name: (id(module), type(module)) for name, module in plain.named_modules()}
    model = adapt((plain, covariances), use_peft=False)
    assert corda_linears(model)
    assert merge(model) is model
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before


@all_options
def test_a_layers_data_is_its_present_state(
    calibrated: Calibrated, adapt: Make, train: Make, options: dict[str, Any]
) -> None:
    model = adapt(calibrated(), use_peft=False, **options)
    start = {name: layer.A.clone() for name, layer in adapter_of(model).layers.items()}
    adapter = adapter_of(train(model))
    assert adapter.record is model.corda_record
    for name, layer in adapter.layers.items():
        module = model.get_submodule(name)
        assert torch.equal(layer.A, module.A)
        assert torch.equal(layer.B, module.B)
        assert layer.scaling == module.scaling
        assert not layer.A.requires_grad
        assert not layer.A.equal(start[name])
        if layer.initial is not None:
            assert layer.initial.A.equal(start[name])
    assert (adapter.initial is None) == (options.get("residual") is None)


@all_options
def test_training_is_the_same_with_and_without_peft(
    calibrated: Calibrated, adapt: Make, train: Make, options: dict[str, Any]
) -> None:
    ours, stock = (
        adapter_of(train(adapt(calibrated(), use_peft=use_peft, **options))).layers
        for use_peft in (False, True)
    )
    for name, layer in ours.items():
        torch.testing.assert_close(layer.A, stock[name].A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.B, stock[name].B, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@all_options
def test_a_model_without_peft_is_saved_exported_and_merged(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    same_logits: Callable[..., bool],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    model = train(adapt(calibrated(), use_peft=False, **options))
    trained, layers = logits(model), adapter_of(model).layers
    save_adapter(model, tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter").layers
    assert all(saved[name].B.equal(layer.B) for name, layer in layers.items())
    export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora")
    assert same_logits(logits(stock), model)
    expected = copy.deepcopy(model)
    merged = merge(model)
    assert merged is model
    assert not corda_linears(merged)
    assert same_logits(logits(merged), expected)
    assert not torch.allclose(trained, logits(calibrated()[0]), atol=0.1)
    for name, layer in layers.items():
        weight = linear_weight(calibrated()[0].get_submodule(name))
        change = linear_weight(merged.get_submodule(name)) - weight
        torch.testing.assert_close(change, layer.change().product(), rtol=1e-4, atol=1e-5)
