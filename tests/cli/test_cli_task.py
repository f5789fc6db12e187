"""Gradients and task starts from the command line, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_text import SMALL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from corda_kernels import CovarianceSet
from corda_kernels.adapter import read_adapter
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.cli import options
from corda_kernels.errors import ConfigError, DataError

pytestmark = pytest.mark.slow

TASK = ("--template", "{question} {answer[0]}", *SMALL)


def test_a_task_start_of_text_and_of_files_is_the_same(
    place: Path,
    invoke: Callable[..., str],
    logits: Callable[[nn.Module], Tensor],
    tmp_path: Path,
) -> None:
    model, rows, text = place / "model", place / "rows.jsonl", place / "text.txt"
    init = ("init", model, tmp_path / "text", "--mode", "task", "--freeze-a")
    told = invoke(*init, "--data", rows, *TASK, "--keep", text)
    assert "TASK adapter of rank 4 for 14 layers" in told
    assert "a LoRA of rank 4\n" in told
    base = AutoModelForCausalLM.from_pretrained(model)
    before = logits(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "text")), before)
    shown = invoke("inspect", tmp_path / "text")
    assert "steepest directions of the task's gradient, B alone" in shown

    cov = tmp_path / "task.safetensors"
    invoke("calibrate", model, cov, "--data", rows, *TASK, "--sides", "both", "--no-stability")
    kept = tmp_path / "kept.safetensors"
    invoke("calibrate", model, kept, "--data", text, *SMALL)
    invoke(
        *("init", model, tmp_path / "files", "--mode", "task"),
        "--cov",
        cov,
        "--keep",
        kept,
        "--rank",
        4,
    )
    found, expected = (read_adapter(tmp_path / name) for name in ("files", "text"))
    for name, layer in expected.layers.items():
        A = found.layers[name].A
        signs = (A * layer.A).sum(1, keepdim=True).sign()
        assert (signs * A - layer.A).norm() < 1e-3 * layer.A.norm(), name
    assert expected.record.freeze_a
    assert expected.record.calibration["keep"]["data"]["file"] == "text.txt"
    assert not found.record.freeze_a


def test_both_halves_of_gradients_make_up_the_whole(
    place: Path, invoke: Callable[..., str], tmp_path: Path
) -> None:
    options = ("--data", place / "text.txt", *SMALL, "--batch-size", 2, "--sides", "both")
    files = [tmp_path / name for name in ("whole", "halves")]
    for file, more in zip(files, ("--no-stability", "--stability"), strict=True):
        invoke("calibrate", place / "model", file, *options, more)
    whole, halves = map(CovarianceSet.load, files)
    for name, gradient in whole.gradients.items():
        error = (halves.gradients[name].mean - gradient.mean).norm() / gradient.mean.norm()
        assert error < 1e-5, name


def test_a_file_written_block_by_block_is_that_of_one_pass(
    place: Path, invoke: Callable[..., str], tmp_path: Path
) -> None:
    options = ("--data", place / "text.txt", *SMALL, "--batch-size", 2, "--sides", "both")
    network = AutoModelForCausalLM.from_pretrained(place / "model")
    files = [tmp_path / name for name in ("whole", "blocks")]
    limit = 3 * covariance_bytes(network, sides="both")[1]  # of two halves and their mean
    for file, more in zip(files, ((), ("--memory-limit", limit)), strict=True):
        invoke("calibrate", place / "model", file, *options, *more)
    whole, blocks = map(CovarianceSet.load, files)
    assert list(blocks) == list(whole)
    assert list(blocks.gradients) == list(whole.gradients)
    for name, gradient in whole.gradients.items():
        for part in ("matrix", "mean"):
            ours, theirs = getattr(blocks.gradients[name], part), getattr(gradient, part)
            assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name
        error = (blocks[name].matrix - whole[name].matrix).norm()
        assert error < 1e-5 * whole[name].matrix.norm(), name


def test_a_plan_counts_gradients(place: Path, invoke: Callable[..., str]) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    d, inner, kv = config["hidden_size"], config["intermediate_size"], 16
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (inner, d), (inner, d), (d, inner)]
    size = 2 * sum(4 * out * (out + channels) for out, channels in shapes)
    told = invoke("plan", place / "model", "--seq-len", 32, "--no-stability", "--sides", "both")
    (line,) = [line for line in told.splitlines() if line.startswith("gradients")]
    assert line.split()[1] == f"{size / 1024:.1f}"
    assert line.split()[3] == f"{size / 2 / 1024:.1f}"  # of one of two blocks
    hidden = 256 * 32 * 4 * d * 3 / 2**20
    (line,) = [line for line in told.splitlines() if line.startswith("hidden states")]
    assert line.split()[-2] == f"{hidden:.1f}"
    assert "2 and back" in told


def test_what_does_not_go_together_is_refused(
    place: Path, invoke: Callable[..., str], tmp_path: Path
) -> None:
    init = ("init", place / "model", tmp_path / "out", "--data", place / "text.txt", *SMALL)
    for more, says in (
        (("--mode", "task", "--budget", "r=4"), "give a rank"),
        (("--mode", "kpm", "--keep", place / "text.txt"), "leave keep out"),
        (("--mode", "task", "--keep-field", "text"), "describe --keep"),
        (("--mode", "ipm", "--freeze-a"), "freeze_a"),
    ):
        with pytest.raises(ConfigError, match=says):
            invoke(*init, *more)
    with pytest.raises(DataError, match=r"no field 'text': .* \(--keep-field, --keep-templ"):
        invoke(*init, "--mode", "task", "--keep", place / "rows.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_task_of_conversations_keeps_a_text_of_fields(
    place: Path, invoke: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[Any] = []

    def noted(given: Any, tokenizer: Any) -> list[Any]:
        read.append({name: given[name] for name in ("template", "chat_template", "answers_only")})
        if len(read) == 2:
            raise DataError("enough")
        return []

    monkeypatch.setattr(options, "text_batches", noted)
    task = ("--data", place / "rows.jsonl", "--chat-template", "--answers-only")
    keep = ("--keep", place / "rows.jsonl", "--keep-template", "{question}")
    with pytest.raises(DataError, match="enough"):
        invoke("init", place / "model", tmp_path / "out", "--mode", "task", *task, *keep)
    assert read == [
        {"template": None, "chat_template": True, "answers_only": True},
        {"template": "{question}", "chat_template": False, "answers_only": False},
    ]
