"""`corda-kernels export` and `merge`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from kinds import Logits
from peft import PeftModel
from safetensors import SafetensorError
from small_text import SMALL
from torch import nn
from transformers import AutoModelForCausalLM

from corda_kernels import load_for_training
from corda_kernels.adapter import read_adapter

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:Could not find a config file in residual of:UserWarning")
def test_a_stored_base_goes_through_training_export_and_merge(
    invoke: Callable[..., str],
    place: Path,
    tmp_path: Path,
    train: Callable[..., nn.Module],
    logits: Logits,
    same_logits: Callable[..., bool],
) -> None:
    out, source = tmp_path / "out", place / "model"
    data = ("--data", place / "text.txt", *SMALL, "--residual", "weight", "--save-base")
    shown = invoke("init", source, out, "--mode", "ipm", *data)
    assert f"{out / 'base'}: the base that it sits on" in shown
    card = ModelCard.load(out / "base" / "README.md")
    assert card.data.base_model == str(source)
    assert "by itself it is no useful model" in card.text
    untouched = AutoModelForCausalLM.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    kept = [
        torch.equal(value, untouched.state_dict()[name])
        for name, value in base.state_dict().items()
    ]
    assert kept.count(False) == 14

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


def test_an_adapter_goes_through_training_export_and_merge(
    invoke: Callable[..., str],
    place: Path,
    tmp_path: Path,
    train: Callable[..., nn.Module],
    logits: Logits,
    same_logits: Callable[..., bool],
) -> None:
    out, source = tmp_path / "out", place / "model"
    invoke("init", source, out, "--mode", "kpm", "--data", place / "text.txt", *SMALL)
    base = AutoModelForCausalLM.from_pretrained(source)
    model = train(PeftModel.from_pretrained(base, str(out), is_trainable=True))
    trained = logits(model)
    untouched = AutoModelForCausalLM.from_pretrained(source)
    assert (trained - logits(untouched)).abs().max() > 0.1
    model.save_pretrained(out)

    shown = invoke("export", out, tmp_path / "lora")
    lora = f"'{tmp_path / 'lora'}'"
    assert shown == (
        f"{tmp_path / 'lora'}: a plain LoRA of rank 8; load it with "
        f"PeftModel.from_pretrained(base, {lora})\n"
    )
    assert torch.equal(logits(PeftModel.from_pretrained(untouched, tmp_path / "lora")), trained)
    (out / "corda.json").unlink()  # as in a checkpoint of Trainer
    invoke("merge", out, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_logits(logits(merged), model)
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.base_model, card.data.library_name) == (str(source), "transformers")
    assert "with the LoRA of out folded into its weights" in card.text


def test_export_cuts_a_lora_off_and_says_what_is_lost(
    invoke: Callable[..., str],
    place: Path,
    tmp_path: Path,
    train: Callable[..., nn.Module],
) -> None:
    out, source = tmp_path / "out", place / "model"
    invoke("init", source, out, "--mode", "ipm", "--data", place / "text.txt", *SMALL)
    base = AutoModelForCausalLM.from_pretrained(source)
    train(PeftModel.from_pretrained(base, str(out), is_trainable=True)).save_pretrained(out)
    errors, spectra = {}, []
    for name, layer in read_adapter(out).layers.items():
        S = torch.linalg.svdvals(layer.B.double() @ layer.A.double())
        errors[name] = float(S[3:].norm() / S.norm())
        spectra.append(S[:8])
    S = torch.stack(spectra)
    total, middle = float(S[:, 3:].norm() / S.norm()), median(errors.values())
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] > 0.01

    shown = invoke("export", out, tmp_path / "short", "--rank", 3)
    assert shown.startswith(
        f"{tmp_path / 'short'}: a plain LoRA of rank 3, with {total:.2%} of the change lost "
        f"(median of the layers {middle:.2%}, worst {errors[worst]:.2%} in {worst}); "
        "load it with PeftModel.from_pretrained(base, "
    )
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source), tmp_path / "short"
    )
    assert stock.peft_config["default"].r == 3
    for name, error in errors.items():
        lora = stock.get_base_model().get_submodule(name)
        whole = read_adapter(out).layers[name].product()
        found = lora.get_delta_weight("default").detach()
        assert (found - whole).norm() / whole.norm() == pytest.approx(error, rel=1e-3), name

    for rank, said in ((8, ""), (20, ", its own: --rank 20 would be more")):  # nothing to cut off
        shown = invoke("export", out, tmp_path / f"all-{rank}", "--rank", rank)
        assert f"a plain LoRA of rank 8{said}; load it with" in shown


def test_merge_says_how_to_find_a_base_that_moved(
    invoke: Callable[..., str], command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    moved, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(place / "model", moved)
    invoke("init", moved, out, "--data", place / "text.txt", *SMALL, "--mode", "ipm")
    shutil.rmtree(moved)
    status, _, lines = command("merge", out, tmp_path / "merged")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].endswith("if the base is elsewhere, give --model")
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
        (out / "base", ("init", model, out, *source, "--residual", "weight", "--save-base")),
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
    stored = (*options, "--residual", "weight", "--save-base")
    more = () if arguments[0] == "merge" else stored
    status, _, lines = command(*(argument.format(**names) for argument in arguments), *more)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: cannot write the model to {names['new']}")
    assert not list(names["new"].rglob("config.json"))
