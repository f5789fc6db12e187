from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from corda_kernels import CordaConfig, export_lora, load_for_training, merge, save_adapter
from corda_kernels.errors import OutputError
from corda_kernels.initialization import adapter_of, residual_marker, subtract_initial
from corda_kernels.linears import linear_weight
from corda_kernels.pipeline import corda_adapter

Calibrated = Callable[..., tuple[nn.Module, Any]]
Make = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]

# Architecture, options of CordaConfig, with PEFT or without.
CASES = [
    ("llama", {}, True),
    ("llama", {"mode": "kpm", "step": "lora"}, False),
    ("llama", {"residual": "weight"}, True),
    ("llama", {"residual": "weight", "step": "lora", "balance": "paper"}, False),
    ("llama", {"targets": ["0.self_attn.v_proj", "down_proj"], "step": "lora"}, True),
    ("gpt2", {"step": "lora"}, True),
    ("gpt2", {"residual": "weight"}, False),
    ("qwen2", {"step": "lora"}, True),
    ("gemma2", {"residual": "weight"}, True),
    ("mixtral", {"step": "lora"}, True),
]
every_case = pytest.mark.parametrize(("architecture", "options", "use_peft"), CASES)
pytestmark = pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")


@every_case
def test_an_export_is_a_plain_lora_of_twice_the_rank(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    same_logits: Callable[..., bool],
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
    use_peft: bool,
) -> None:
    model = train(adapt(calibrated(architecture), use_peft=use_peft, **options))
    save_adapter(model, tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    export_lora(model, tmp_path / "same")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()

    layers = adapter_of(model).layers
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert (A.shape[0], B.shape[1]) == (8, 8)
        torch.testing.assert_close(layer.scaling * B @ A, layer.delta())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (8, 8, True)
    assert config["alpha_pattern"].keys() == (layers.keys() if options.get("step") else set())

    stock = PeftModel.from_pretrained(calibrated(architecture)[0], tmp_path / "lora")
    assert same_logits(logits(stock), model)
    assert not torch.allclose(logits(stock), logits(calibrated(architecture)[0]), atol=0.1)


@every_case
def test_a_merge_is_a_plain_model(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    same_logits: Callable[..., bool],
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
    use_peft: bool,
) -> None:
    model = train(adapt(calibrated(architecture), use_peft=use_peft, **options))
    save_adapter(model, tmp_path / "adapter")
    merged = merge(load_for_training(calibrated(architecture)[0], tmp_path / "adapter"))
    untouched, _ = calibrated(architecture)
    assert type(merged) is type(untouched)
    assert merged.state_dict().keys() == untouched.state_dict().keys()
    assert residual_marker(merged) is None
    merged.save_pretrained(tmp_path / "merged")
    assert "corda" not in (tmp_path / "merged" / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded), logits(merged))
    assert same_logits(logits(reloaded), model)


@pytest.mark.parametrize("residual", ["pair", "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
def test_a_merge_rounds_the_weights_once(
    calibrated: Calibrated, adapt: Make, train: Make, residual: str, use_peft: bool
) -> None:
    model, covariances = calibrated()
    model = train(adapt((model.bfloat16(), covariances), use_peft=use_peft, residual=residual))
    layers = adapter_of(model).layers
    merged = merge(model)
    for name, layer in layers.items():
        base = linear_weight(calibrated()[0].bfloat16().get_submodule(name)).float()
        if residual == "weight":
            base = (base - layer.initial_product()).bfloat16() + layer.initial_product()
        found = linear_weight(merged.get_submodule(name))
        # Summed in another order in float32, a few entries round to the other side.
        assert (found != (base + layer.delta()).bfloat16()).float().mean() < 0.01


def test_an_untrained_merge_gives_the_base_back(calibrated: Calibrated, adapt: Make) -> None:
    untouched, _ = calibrated()
    merged = merge(adapt(calibrated()))
    for name, value in merged.state_dict().items():
        expected = untouched.state_dict()[name]
        # What is left of B A − B0 A0 in float32, of factors as large as the weight.
        assert (value - expected).norm() <= torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_stored_residual_base_is_merged_to_the_same(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path, use_peft: bool
) -> None:
    model, covariances = calibrated()
    config = CordaConfig("ipm", rank=4, residual="weight", progress=False)
    subtract_initial(model, corda_adapter(model, covariances, config))
    model.save_pretrained(tmp_path / "base")
    save_adapter(train(adapt(calibrated(), residual="weight")), tmp_path / "adapter")
    on_residual, on_untouched = (
        merge(load_for_training(base, tmp_path / "adapter", use_peft=use_peft)).state_dict()
        for base in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            calibrated()[0],
        )
    )
    assert all(torch.equal(on_residual[name], on_untouched[name]) for name in on_untouched)


def test_peft_itself_can_merge_the_pair(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    same_logits: Callable[..., bool],
) -> None:
    model = train(adapt(calibrated()))
    trained = logits(model)
    assert same_logits(trained, model.merge_and_unload())


def test_an_output_that_is_a_file_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file already"):
        export_lora(adapt(calibrated()), tmp_path / "file")


def test_an_export_does_not_damage_an_adapter(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    save_adapter(adapt(calibrated()), tmp_path)
    with pytest.raises(OutputError, match="holds an adapter"):
        export_lora(tmp_path, tmp_path)
    load_for_training(calibrated()[0], tmp_path)


def test_the_adapter_of_a_nameless_base_names_none(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    model, covariances = calibrated()
    model.name_or_path = ""
    save_adapter(adapt((model, covariances)), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] is None
