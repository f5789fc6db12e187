"""`corda-kernels export` and `merge`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
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


def test_a_model_without_a_tokenizer_is_stored_and_merged_with_a_warning(
    invoke: Callable[..., str], command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    """Covariances may come from elsewhere: `init --cov` and `merge` need no tokenizer."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(place / "model", model, ignore=shutil.ignore_patterns("tokenizer*"))
    data = ("--data", place / "text.txt", *SMALL)
    invoke("calibrate", place / "model", tmp_path / "covariances", *data)
    source = ("--cov", tmp_path / "covariances", "--mode", "ipm", "--rank", 4)
    for written, arguments in (
        (out / "base", ("init", model, out, *source, "--save-base")),
        (tmp_path / "merged", ("merge", out, tmp_path / "merged")),
    ):
        status, shown, lines = command(*arguments)
        assert (status, len(lines)) == (0, 1)
        assert lines[0].startswith(f"warning: {written} gets no tokenizer: {model} has no tokeni")
        assert str(written) in shown
        AutoModelForCausalLM.from_pretrained(written)


@pytest.mark.parametrize("arguments", [("merge", "{out}", "{new}"), ("init", "{model}", "{new}")])
def test_a_disk_that_fills_up_leaves_no_half_model(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
) -> None:
    names = {"model": place / "model", "out": tmp_path / "out", "new": tmp_path / "new"}
    options = ("--data", place / "text.txt", *SMALL, "--mode", "ipm")
    invoke("init", names["model"], names["out"], *options)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    more = () if arguments[0] == "merge" else (*options, "--save-base")
    status, _, lines = command(*(argument.format(**names) for argument in arguments), *more)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: cannot write the model to {names['new']}")
    assert not list(names["new"].rglob("config.json"))
