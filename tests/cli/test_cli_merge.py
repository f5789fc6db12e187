"""`corda-kernels export` and `merge`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_text import SMALL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from corda_kernels import (
    load_for_training,
)

Logits = Callable[[nn.Module], Tensor]


@pytest.mark.parametrize("residual", ["pair", "weight"])
def test_a_stored_base_goes_through_training_export_and_merge(
    invoke: Callable[..., str],
    place: Path,
    tmp_path: Path,
    train: Callable[..., nn.Module],
    logits: Logits,
    same_logits: Callable[..., bool],
    residual: str,
) -> None:
    out, source = tmp_path / "out", place / "model"
    data = ("--data", place / "text.txt", *SMALL, "--residual", residual, "--save-base")
    shown = invoke("init", source, out, "--mode", "ipm", *data)
    assert f"{out / 'base'}: the base that it sits on" in shown
    untouched = AutoModelForCausalLM.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    kept = [
        torch.equal(value, untouched.state_dict()[name])
        for name, value in base.state_dict().items()
    ]
    assert all(kept) == (residual == "pair")

    model = load_for_training(base, out)
    assert same_logits(logits(model), untouched)
    train(model).save_pretrained(out)
    invoke("export", out, tmp_path / "lora")
    assert same_logits(logits(PeftModel.from_pretrained(untouched, tmp_path / "lora")), model)
    for name, options in (("merged", ()), ("again", ("--model", out / "base"))):
        shown = invoke("merge", out, tmp_path / name, *options)
        assert f"{tmp_path / name}: a plain model" in shown
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert same_logits(logits(merged), model)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (
            source / "tokenizer.json"
        ).read_bytes()


def test_merge_says_how_to_find_a_base_that_moved(
    invoke: Callable[..., str], command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    moved, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(place / "model", moved)
    invoke("init", moved, out, "--data", place / "text.txt", *SMALL, "--mode", "ipm")
    shutil.rmtree(moved)
    status, _, lines = command("merge", out, tmp_path / "merged")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].endswith("say where the base is with --model")
    invoke("merge", out, tmp_path / "merged", "--model", place / "model")


def test_what_a_merged_model_would_damage_is_refused(
    invoke: Callable[..., str], command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", tmp_path / "model"
    shutil.copytree(place / "model", source)
    invoke("init", source, out, "--mode", "ipm", "--data", place / "text.txt", *SMALL)
    for folder, says in ((out, "holds an adapter"), (source, "is the base itself")):
        status, _, lines = command("merge", out, folder)
        assert (status, len(lines)) == (2, 1)
        assert lines[0].startswith(f"error: {folder} {says}")
    status, _, lines = command("export", out, source)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {source} holds a model")
