from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from corda_kernels import CordaLinear, CovarianceSet
from corda_kernels.errors import AdapterError
from corda_kernels.initialization.linear import adapter_of_linears, detach_linears

Calibrated = Callable[..., tuple[nn.Module, CovarianceSet]]
Make = Callable[..., nn.Module]


def corda_linears(model: nn.Module) -> dict[str, CordaLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, CordaLinear)}


@pytest.mark.parametrize("residual", ["pair", "weight"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_layer_adds_what_it_learnt(
    calibrated: Calibrated, adapt: Make, train: Make, architecture: str, residual: str
) -> None:
    plain, covariances = calibrated(architecture)
    start = copy.deepcopy(plain), covariances
    model = train(adapt(start, use_peft=False, residual=residual, step="lora"))
    layers = corda_linears(model)
    assert list(layers) == list(covariances)
    for name, layer in layers.items():
        x = torch.randn(2, 5, layer.A.shape[1])
        expected = plain.get_submodule(name)(x) + x @ layer.layer().delta().T
        torch.testing.assert_close(layer(x), expected)
        assert layer(x).shape == (2, 5, layer.B.shape[0])


def test_the_wrapped_layer_is_frozen(calibrated: Calibrated, adapt: Make) -> None:
    made = adapt(calibrated(), use_peft=False).get_submodule("model.layers.0.mlp.down_proj")
    layer = CordaLinear(nn.Linear(48, 32), made.layer(), made.record)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_in_float32_on_a_narrow_base(
    calibrated: Calibrated, adapt: Make, dtype: torch.dtype
) -> None:
    model, covariances = calibrated()
    model = adapt((model.to(dtype), covariances), use_peft=False)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    for name in ("A", "B", "A0", "B0"):
        assert getattr(layer, name).dtype == torch.float32
    x = torch.randn(3, 48).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), layer.base(x))


def test_nothing_but_the_factors_is_trained(
    calibrated: Calibrated, adapt: Make, train: Make
) -> None:
    model, covariances = calibrated()
    model = adapt((model, covariances), use_peft=False)
    before = copy.deepcopy(model.state_dict())
    train(model)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {f"{name}.{factor}" for name in covariances for factor in "AB"}


def test_the_initial_factors_cannot_be_made_trainable(
    calibrated: Calibrated, adapt: Make, train: Make
) -> None:
    model = adapt(calibrated(), use_peft=False).requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    train(model)
    for name, value in model.state_dict().items():
        assert value.equal(before[name]) == name.endswith(("A0", "B0")), name


def test_detaching_gives_the_model_back(calibrated: Calibrated, adapt: Make) -> None:
    plain, covariances = calibrated("gpt2")
    before = {name: (id(module), type(module)) for name, module in plain.named_modules()}
    model = adapt((plain, covariances), use_peft=False)
    assert corda_linears(model)
    assert detach_linears(model) is model
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before


def test_a_layers_data_is_its_present_state(
    calibrated: Calibrated, adapt: Make, train: Make
) -> None:
    model = train(adapt(calibrated(), use_peft=False))
    adapter = adapter_of_linears(model)
    assert adapter.initial_checksum() == adapter.record.initial_sha256
    for name, layer in adapter.layers.items():
        pairs: list[tuple[Tensor, Tensor]] = [
            (getattr(layer, factor), getattr(model.get_submodule(name), factor))
            for factor in ("A", "B", "A0", "B0")
        ]
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
        assert not layer.A.equal(layer.A0)


def test_a_model_without_adapter_is_refused(calibrated: Calibrated) -> None:
    with pytest.raises(AdapterError, match="carries no adapter of this package: attach one with"):
        adapter_of_linears(calibrated()[0])
