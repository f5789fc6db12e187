"""How PEFT's patterns are read: as the names that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kinds import Calibrated
from peft import LoraConfig, PeftModel, get_peft_model

from corda_kernels import export_lora, load_for_training
from corda_kernels.adapter.lora import lora_layers, read_lora
from corda_kernels.errors import AdapterError

PATTERNS = {
    "q_proj": "both",
    "layers.1.self_attn.q_proj": "second",
    r"layers\.1\.self_attn\.q_proj$": "second",
    r"^model\.layers\.1\.self_attn\.q_proj": "second",
    r".*\.1\.self_attn\.q_proj": "second",
    ".*1.self_attn.q_proj": "second",
    "^q_proj": "none",
    r"(([a-z0-9_.])*)*X": "refused",
    "layers.[01].self_attn.q_proj": "refused",
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:.*matched no.*", "ignore:.*_pattern")
def test_patterns_in_a_file_are_names(calibrated: Calibrated, tmp_path: Path, pattern: str) -> None:
    expected = PATTERNS[pattern]
    peft = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    get_peft_model(calibrated()[0], peft).save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {pattern: 12}}))
    if expected == "refused":
        with pytest.raises(AdapterError, match="expressions from files are not ru"):
            export_lora(tmp_path / "lora", tmp_path / "out")
        return
    layers = lora_layers(read_lora(tmp_path / "lora"))
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora").get_base_model()
    for name, layer in layers.items():
        assert layer.scaling == stock.get_submodule(name).scaling["default"]
    assert [layer.scaling == 3 for layer in layers.values()] == [
        expected == "both",
        expected in ("both", "second"),
    ]


HOSTILE = "(([a-z0-9_.])*)*X"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": HOSTILE},
        {"exclude_modules": HOSTILE},
        {"layers_pattern": [HOSTILE], "layers_to_transform": [0, 1]},
        {"target_modules": r".*\.q_proj"},
    ],
)
def test_a_selection_by_an_expression_is_made_anew_from_the_tensors(
    calibrated: Calibrated, tmp_path: Path, changes: dict[str, Any]
) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(calibrated()[0], peft).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model: Any = load_for_training(calibrated()[0], tmp_path)
    assert model.peft_config["default"].target_modules == {"q_proj"}
    assert len(lora_layers(read_lora(tmp_path))) == 2


def test_a_selection_of_layers_that_are_not_there_is_refused(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    peft = LoraConfig(r=4, target_modules=r".*\.q_proj")
    get_peft_model(calibrated(num_hidden_layers=3)[0], peft).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"of layers of this model \(model.layers.2.*if you tr"):
        load_for_training(calibrated()[0], tmp_path)


@pytest.mark.parametrize("saved", [[HOSTILE], ["lm_.*"], "lm_head", [1]])
def test_modules_to_save_are_names(calibrated: Calibrated, tmp_path: Path, saved: Any) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(calibrated()[0], peft).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": saved}))
    with pytest.raises(AdapterError, match="was altered: modules_to_save is"):
        load_for_training(calibrated()[0], tmp_path)
