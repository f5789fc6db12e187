from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Calibrated, Make
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from corda_kernels import load_for_training, save_adapter
from corda_kernels.adapter import CordaLinear, adapter_of, live_adapter
from corda_kernels.adapter.model import has_adapter, residual_marker
from corda_kernels.errors import AdapterError


@pytest.mark.parametrize("residual", [None, "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
def test_a_live_adapter_holds_the_parameters_themselves(
    calibrated: Calibrated, adapt: Make, use_peft: bool, residual: str | None
) -> None:
    model = adapt(calibrated(), use_peft=use_peft, residual=residual)
    live, (names, covariances) = live_adapter(model), ([], calibrated()[1])
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    for name, layer in live.layers.items():
        names.append(name)
        assert {id(layer.A), id(layer.B)} <= trainable
        trainable -= {id(layer.A), id(layer.B)}
        assert (layer.initial is None) == (residual is None)
        assert isinstance(live.modules[name], CordaLinear) != use_peft
    assert names == list(covariances)
    assert not trainable
    assert live.record is model.corda_record
    assert all(not layer.A.requires_grad for layer in adapter_of(model).layers.values())


def test_the_adapter_of_stock_peft_is_found_but_has_no_record(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    from peft import PeftModel

    save_adapter(adapt(calibrated(), hold=8), tmp_path)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path, is_trainable=True)
    live = live_adapter(stock)
    assert live.record is None
    assert {layer.scaling for layer in live.layers.values()} == {1 / 8}
    with pytest.raises(AdapterError, match="no record of how it was made: stock PEFT saves and"):
        adapter_of(stock)


def plain(model: nn.Module, **options: Any) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))


def with_two(model: nn.Module) -> nn.Module:
    wrapped: Any = plain(model)
    wrapped.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    wrapped.base_model.set_adapter(["default", "other"])
    return wrapped


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda m: m,
            "the model carries no adapter of linear layers: attach one with init_corda or load",
        ),
        (
            lambda m: plain(m, init_lora_weights="pissa"),
            "adapter 'default' was initialised by init_lora_weights='pissa', which does not start",
        ),
        (
            lambda m: plain(m, init_lora_weights=False),
            "init_lora_weights=False, which does not start at B A = 0",
        ),
        (lambda m: plain(m, use_dora=True), "computes more than W x .*: use a plain LoRA"),
        (
            lambda m: get_peft_model(
                m, IA3Config(target_modules=["q_proj"], feedforward_modules=[])
            ),
            r"active adapters are default \(IA3Config\): activate one LoRA with set_adapter",
        ),
        (with_two, r"are default \(LoraConfig\), other \(LoraConfig\): activate one LoRA"),
        (
            lambda m: get_peft_model(m, LoraConfig(target_modules=["embed_tokens"])),
            "carries no adapter of linear layers",
        ),
    ],
    ids=["none", "pissa", "random", "dora", "another kind", "two", "embeddings"],
)
def test_a_model_whose_change_is_not_known_is_refused(
    calibrated: Calibrated, wrap: Make, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        live_adapter(wrap(calibrated()[0]))


def test_a_residual_whose_initial_factors_are_not_at_hand_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated(), residual="weight")
    assert residual_marker(model.get_base_model()) is not None
    base = model.unload()
    for note in ("corda_record", "corda_initial"):
        assert not hasattr(base, note)
    with pytest.raises(
        AdapterError, match=r"belongs on the residual W − B0 A0, .* load_for_training"
    ):
        live_adapter(plain(base))


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_model_is_told_to_carry_an_adapter(
    calibrated: Calibrated, adapt: Make, use_peft: bool
) -> None:
    assert not has_adapter(calibrated()[0])
    assert has_adapter(adapt(calibrated(), use_peft=use_peft))
    assert has_adapter(plain(calibrated()[0]))


def test_dora_is_no_plain_change_but_is_loaded_and_saved(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated(), use_dora=True)
    with pytest.raises(AdapterError, match="computes more than W x"):
        live_adapter(model)
    save_adapter(model, tmp_path / "first")
    loaded = load_for_training(calibrated()[0], tmp_path / "first")
    save_adapter(loaded, tmp_path / "second")
    for file in ("adapter_model.safetensors", "adapter_config.json", "corda.json", "README.md"):
        first, second = (tmp_path / folder / file for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    assert torch.equal(
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight,
        loaded.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight,
    )
