"""LoRAs that PEFT has made are exported too, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import described, written
from kinds import Calibrated, Logits, Make
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corda_kernels import export_lora, save_adapter
from corda_kernels.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning"),
    # PEFT looks for the base to see whether its embeddings have another size.
    pytest.mark.filterwarnings("ignore:Could not find a config file in residual of:UserWarning"),
]


def stock_lora(calibrated: Calibrated, train: Make, **options: Any) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM", **({"target_modules": ["q_proj", "down_proj"]} | options)
    )
    return train(get_peft_model(calibrated()[0], config))


@pytest.mark.parametrize(
    ("options", "from_model"),
    [
        ({"init_lora_weights": "gaussian"}, False),
        ({"r": 4, "lora_alpha": 5, "use_rslora": True}, True),
        ({"r": 4, "lora_alpha": 5, "use_rslora": True}, False),
        ({"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 2}}, True),
        ({"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 2}}, False),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"bias": "all"}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*bias='all'.*:UserWarning")
def test_a_lora_of_peft_is_exported_too(
    calibrated: Calibrated,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
    from_model: bool,
) -> None:
    model = stock_lora(calibrated, train, **options)
    model.save_pretrained(tmp_path / "adapter")
    found = export_lora(model if from_model else tmp_path / "adapter", tmp_path / "lora")
    config = described(tmp_path / "lora")
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert {A.shape[0] for A, _ in written(tmp_path / "lora").values()} == {found.rank}
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "embed_tokens"]}, {"lora_bias": True}],
    ids=["embeddings", "bias of B"],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:.*have invalid shape")
def test_a_lora_with_other_parts_can_only_be_copied(
    calibrated: Calibrated, train: Make, logits: Logits, tmp_path: Path, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        model = stock_lora(calibrated, lambda model: model, r=4, **options)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "copied", save_embedding_layers=False)
    export_lora(tmp_path / "copied", tmp_path / "lora")
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora")
    assert torch.equal(logits(stock), logits(model.eval()))
    with pytest.raises(AdapterError, match=r"more than the weights of linear layers \(base_model"):
        export_lora(tmp_path / "copied", tmp_path / "cut", 2)
    scaled = stock_lora(calibrated, train, r=4, use_rslora=True, **options)
    scaled.save_pretrained(tmp_path / "scaled", save_embedding_layers=False)
    with pytest.raises(AdapterError, match="can only be copied: export it at its own rank"):
        export_lora(tmp_path / "scaled", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda m: m,
            "carries no adapter of linear layers: attach one with init_corda or load_for_training",
        ),
        (
            lambda m: get_peft_model(
                m, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
            ),
            "init_lora_weights='pissa', which does not start at B A = 0",
        ),
    ],
    ids=["plain", "pissa"],
)
def test_a_model_without_a_lora_on_the_untouched_base_is_refused(
    calibrated: Calibrated, tmp_path: Path, wrap: Make, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        export_lora(wrap(calibrated()[0]), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_adapter_of_a_residual_that_stock_peft_loaded_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    adapt(calibrated(), residual="weight").save_pretrained(tmp_path / "checkpoint")
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "checkpoint")
    with pytest.raises(AdapterError, match="belongs on the residual W − B0 A0"):
        export_lora(stock, tmp_path / "out")


def test_dora_hides_no_foreign_start(calibrated: Calibrated, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, use_dora=True, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]
    )
    with pytest.raises(AdapterError, match="init_lora_weights='pissa'"):
        export_lora(get_peft_model(calibrated()[0], config), tmp_path)


def test_patterns_of_a_model_are_expressions(
    calibrated: Calibrated, train: Make, logits: Logits, tmp_path: Path
) -> None:
    pattern = {r"layers\.[1-9]\..*": 2}
    model = stock_lora(calibrated, train, rank_pattern=pattern, alpha_pattern=pattern)
    export_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_initial_factors_that_another_adapter_left_behind_are_named(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    save_adapter(adapt(calibrated(), residual="weight", rank=8), tmp_path)
    (tmp_path / "corda.json").unlink()
    adapt(calibrated(), rank=4).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"corda_initial\.safetensors is left over"):
        export_lora(tmp_path, tmp_path / "out")


def test_a_lora_of_a_convolution_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(AdapterError, match="adapts 0, which is no linear layer but a convolution"):
        export_lora(model, tmp_path / "out")
    with pytest.raises(AdapterError, match="layer 0, or its A and B do not fit"):
        export_lora(tmp_path / "saved", tmp_path / "out")
