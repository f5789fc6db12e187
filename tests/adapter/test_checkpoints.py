"""Folders that PEFT or a trainer has written alone."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import BUDGET, INITIAL, NO_BASE, same
from kinds import Calibrated, Logits, Make
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corda_kernels import export_lora, load_for_training, save_adapter
from corda_kernels.adapter import read_adapter
from corda_kernels.errors import AdapterError

pytestmark = pytest.mark.filterwarnings(NO_BASE)


@pytest.mark.parametrize("options", [{}, {"hold": 8} | BUDGET, {"use_dora": True}])
def test_a_checkpoint_that_peft_wrote_alone_loads(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    model = train(adapt(calibrated(), **options))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "corda.json").exists()
    loaded = load_for_training(calibrated()[0], tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.corda_record is None
    with pytest.raises(AdapterError, match="no record of how it was made: stock PEFT saves"):
        save_adapter(loaded, tmp_path)
    with pytest.raises(AdapterError, match=r"has no corda\.json: .*PEFT does not need it"):
        read_adapter(tmp_path)


def test_a_checkpoint_of_the_published_form_needs_the_initial_factors(
    calibrated: Calibrated, adapt: Make, train: Make, logits: Logits, tmp_path: Path
) -> None:
    fresh, checkpoint = tmp_path / "fresh", tmp_path / "checkpoint"
    model = adapt(calibrated(), residual="weight")
    save_adapter(model, fresh)
    train(model).save_pretrained(checkpoint)
    for use in (lambda f: load_for_training(calibrated()[0], f), lambda f: export_lora(f, f / "x")):
        with pytest.raises(AdapterError, match=rf"{checkpoint} has no {INITIAL}: .*fresh adapter"):
            use(checkpoint)
    shutil.copy(fresh / INITIAL, checkpoint)
    assert torch.equal(logits(load_for_training(calibrated()[0], checkpoint)), logits(model))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            lambda c: c("gpt2")[0],
            "model.* of this model is no linear layer, .* load its base without another adapter",
        ),
        (lambda c: c(intermediate_size=40)[0], r"is \(32, 40\), but the adapter is for \(32, 48\)"),
    ],
)
def test_a_checkpoint_of_the_published_form_leaves_another_base_alone(
    calibrated: Calibrated, published: Path, base: Callable[[Calibrated], nn.Module], message: str
) -> None:
    (published / "corda.json").unlink()
    other = base(calibrated)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_for_training(other, published)
    assert same(dict(other.state_dict()), dict(before))


@pytest.mark.parametrize("init_lora_weights", ["pissa", "olora"])
def test_another_start_of_peft_is_loaded_as_peft_does(
    calibrated: Calibrated, train: Make, logits: Logits, tmp_path: Path, init_lora_weights: str
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init_lora_weights)
    model = train(get_peft_model(calibrated()[0], config))
    model.save_pretrained(tmp_path)
    loaded = load_for_training(calibrated()[0], tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(AdapterError, match=f"'{init_lora_weights}', which does not start at B A"):
        export_lora(tmp_path, tmp_path / "lora")


def test_a_pickled_checkpoint_is_read_by_peft_only(
    calibrated: Calibrated, adapt: Make, logits: Logits, tmp_path: Path
) -> None:
    model = adapt(calibrated())
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path)
    assert torch.equal(logits(stock), logits(model))
    for use in (lambda f: load_for_training(calibrated()[0], f), lambda f: export_lora(f, f / "x")):
        with pytest.raises(AdapterError, match=r"PeftModel.* also reads adapter_model\.bin, and s"):
            use(tmp_path)
