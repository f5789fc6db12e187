"""`corda-kernels init`."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Logits
from peft import PeftModel
from safetensors.torch import load_file
from small_text import SMALL
from transformers import AutoModelForCausalLM

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    load_for_training,
    load_model,
    mix_covariances,
)
from corda_kernels.adapter import adapter_of, read_adapter
from corda_kernels.init import corda_adapter
from corda_kernels.planning import Selection


@pytest.mark.parametrize(
    "data",
    [
        ("text.txt",),
        ("rows.jsonl", "--template", r"Q: {question}\nA: {answer[0]}"),
        ("rows.jsonl", "--field", "question", "--no-pack", "--batch-size", 3),
    ],
    ids=["text", "template", "field"],
)
def test_init_writes_an_adapter_that_starts_at_the_base(
    invoke: Callable[..., str], place: Path, tmp_path: Path, logits: Logits, data: Any
) -> None:
    file, *options = data
    model, out = place / "model", tmp_path / "out"
    # Unpacked, the questions hold about 120 tokens: enough for every layer.
    data = ("--data", place / file, *SMALL, *options)
    shown = invoke("init", model, out, "--mode", "ipm", *data, "--stability")
    assert f"{out}: IPM adapter of rank 4 for 14 layers of {model}: a LoRA of rank 8" in shown
    assert "calibration: " in shown
    assert "next: " in shown
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = logits(base)
    adapted = load_for_training(base, out)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    noted = adapter_of(adapted).record.calibration["data"]
    assert noted["file"] == file
    assert noted["samples"] == 8
    # What stood for a line feed on the command line is one.
    template = "Q: {question}\nA: {answer[0]}" if "--template" in options else None
    assert noted["template"] == template


def test_options_of_init_reach_the_adapter(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    options = "--mode kpm --hold 8 --damping 0.1 --no-stability --rank 3"
    targets = ("--targets", "q_proj, mlp.up_proj", "--dtype", "bfloat16", "--method", "exact")
    targets += ("--exclude", "0.mlp.up_proj")
    data = ("--data", place / "text.txt", *SMALL, *options.split(), *targets)
    shown = invoke("init", place / "model", tmp_path / "out", *data)
    assert "calibration:" not in shown
    adapter = read_adapter(tmp_path / "out")
    record = adapter.record
    assert (record.mode, record.rank, record.hold, record.residual) == ("kpm", 3, 8.0, None)
    assert (record.damping, record.stability) == (0.1, {})
    endings = ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj")
    assert list(adapter.layers) == [f"model.layers.{ending}" for ending in endings]
    for layer in adapter.layers.values():
        assert (layer.rank, layer.scaling, layer.initial) == (6, 1 / 8, None)


def test_the_published_form_is_an_option(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = ("--data", place / "text.txt", *SMALL, "--mode", "ipm")
    shown = invoke("init", place / "model", out, *data, "--residual", "weight")
    loaded = f"corda_kernels.load_model('{place / 'model'}')"
    assert f"next: model = corda_kernels.load_for_training({loaded}, '{out}')" in shown
    adapter = read_adapter(out)
    assert (adapter.record.hold, adapter.record.residual) == (None, "weight")
    for layer in adapter.layers.values():
        assert torch.equal(layer.A, layer.initial.A)
        assert torch.equal(layer.B, layer.initial.B)
        assert (layer.rank, layer.scaling) == (4, 1.0)
    out = tmp_path / "plain"
    shown = invoke("init", place / "model", out, *data, "--residual", "none")
    next_step = f"next: model = corda_kernels.load_for_training({loaded}, '{out}'), then train it"
    assert next_step in shown
    assert read_adapter(out).record.residual is None


def test_what_init_says_loads_the_adapter_with_stock_peft(
    invoke: Callable[..., str], place: Path, tmp_path: Path, logits: Logits
) -> None:
    out = tmp_path / "out"
    invoke("init", place / "model", out, "--mode", "ipm", "--data", place / "text.txt", *SMALL)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    expected = logits(base)
    model = PeftModel.from_pretrained(base, str(out), is_trainable=True)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].r == 8
    assert len([p for p in model.parameters() if p.requires_grad]) == 28


def lines_by_layer(shown: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in shown.splitlines() if line}


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["argmin", "pool"])
def test_candidates_and_a_budget_show_in_what_is_printed(
    invoke: Callable[..., str], place: Path, tmp_path: Path, selection: str
) -> None:
    file, adapter = tmp_path / "covariances.safetensors", tmp_path / "adapter"
    select = ("--candidates", 3, "--selection", selection)
    text = ("--data", place / "text.txt", *SMALL, "--samples", 4, *select)
    shown = invoke("calibrate", place / "model", file, *text)
    assert "selection: 3 candidates, whose scores differ by" in shown
    report = Selection.from_json(CovarianceSet.load(file).provenance["selection"])
    assert report.domains == ["text.txt"] * 3
    assert report.tokens == [4 * 32] * 3
    chosen = {
        name: "all" if selection == "pool" else str(winner + 1)
        for name, winner in report.winners().items()
    }
    table = lines_by_layer(invoke("inspect", file))
    assert table["layer"][-5:] == ["chosen", "score", "min", "max", "spread"]
    assert {name: table[name][-4] for name in chosen} == chosen

    model = place / "model"
    budget = ("--mode", "kpm", "--budget", "r=2", "--max-rank", 8)
    shown = invoke("init", model, adapter, *budget, *text)
    record = read_adapter(adapter).record
    ranks = record.allocation["ranks"]
    assert f"KPM adapter of ranks 1 to {record.rank}" in shown
    assert f"{record.allocation['spent']:,} of {record.allocation['budget']:,} parameters" in shown
    assert "all are samples of one text" in shown
    assert 2 < record.rank <= 8
    shown = invoke("inspect", adapter)
    table = lines_by_layer(shown)
    for name, rank in ranks.items():
        assert table[name][2 if rank else 1] == str(rank)
        assert table[name][-4] == chosen[name]
    assert "selection: 3 candidates" in shown


def test_a_mixture_of_two_files(invoke: Callable[..., str], place: Path, tmp_path: Path) -> None:
    model, files = place / "model", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        text = ("--data", place / "text.txt", *SMALL, "--seed", seed, "--no-stability")
        invoke("calibrate", model, file, *text)
    parts = ("--mix", f"{files[0]}=3", "--mix", f"{files[1]}=1")
    shown = invoke("init", model, tmp_path / "out", "--mode", "kpm", "--rank", 4, *parts)
    line = "mixture: 0.75 a.safetensors + 0.25 b.safetensors, their traces made equal"
    assert line in shown.splitlines()
    found = read_adapter(tmp_path / "out")
    mixture = found.record.calibration["mixture"]
    assert mixture["weights"] == [0.75, 0.25]
    assert mixture["files"] == ["a.safetensors", "b.safetensors"]
    mixed = mix_covariances([CovarianceSet.load(file) for file in files], [3, 1])
    config = CordaConfig("kpm", rank=4, progress=False)
    expected = corda_adapter(load_model(model), mixed, config)
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].A, layer.A)
        assert torch.equal(found.layers[name].B, layer.B)
    assert line in invoke("inspect", tmp_path / "out").splitlines()


def test_a_stored_residual_cannot_be_initialised_again(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    place: Path,
    tmp_path: Path,
) -> None:
    data = ("--data", place / "text.txt", *SMALL, "--mode", "ipm")
    out = tmp_path / "out"
    invoke("init", place / "model", out, *data, "--residual", "weight", "--save-base")
    status, _, lines = command("init", out / "base", tmp_path / "second", *data)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("error: this model is the residual of an adapter")


def test_a_base_to_store_counts_as_needed_space(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 0, 60_000))
    data = ("--data", place / "text.txt", *SMALL, "--mode", "ipm")
    data += ("--residual", "weight")
    status, _, lines = command("init", place / "model", tmp_path / "out", *data, "--save-base")
    assert (status, len(lines)) == (2, 1)
    assert "needs about" in lines[0]
    assert command("init", place / "model", tmp_path / "out", *data)[0] == 0


@pytest.mark.parametrize("residual", ["none", "weight"])
def test_all_factors_of_the_adapter_count_as_needed_space(
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    tmp_path: Path,
    residual: str,
) -> None:
    # Four components in 14 layers with Σ(out + in) = 928, as 2 rows each or as A, A0, B and B0.
    size = 4 * 2 * 4 * 928
    usage = namedtuple("usage", "total used free")
    data = ("--data", place / "text.txt", *SMALL, "--mode", "ipm", "--residual", residual)
    for free, expected in ((size - 1, 2), (2 * size, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(2**40, 0, free))
        status, _, lines = command("init", place / "model", tmp_path / "out", *data)
        assert (status, len(lines)) == (expected, 1 if expected else 0)
    found = sum(
        tensor.nbytes
        for file in (tmp_path / "out").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert found == size


def test_few_tokens_are_one_warning(
    command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    data = ("--data", place / "text.txt", "--samples", 2, "--seq-len", 10, "--rank", 4)
    status, out, lines = command("init", place / "model", tmp_path / "out", "--mode", "ipm", *data)
    assert (status, len(lines)) == (0, 1)
    assert lines[0].startswith(
        "warning: the covariances of 14 layer(s) come from fewer tokens than channels"
    )
    assert "IPM adapter of rank 4" in out


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning")
def test_text_that_fills_one_batch_leaves_no_verdict_and_says_so(
    command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    data = ("--data", place / "text.txt", *SMALL, "--batch-size", 64)
    _, shown, _ = command(
        "init", place / "model", tmp_path / "judged", "--mode", "ipm", *data, "--stability"
    )
    assert "calibration: the text fills one batch, which has no halves to compare" in shown
    _, shown, _ = command("init", place / "model", tmp_path / "out", "--mode", "ipm", *data)
    assert "calibration:" not in shown
