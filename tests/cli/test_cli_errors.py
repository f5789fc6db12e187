"""Errors of every command: one line, exit status 2, nothing left behind."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_text import SMALL
from transformers import LlamaModel

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
    "rank": (
        (*INIT, *TEXT, "--targets", "k_proj", "--rank", 17),
        "rank 17 is not possible for layer model.layers.0.self_attn.k_proj (16 × 32): choose one",
    ),
    "targets": ((*INIT, *TEXT, "--targets", "foo"), "no linear layer matches targets ['foo']"),
    "no targets": (
        (*INIT, *TEXT, "--targets", ","),
        "--targets is empty: leave it out, or give en",
    ),
    "no exclusion": ((*INIT, *TEXT, "--exclude", ","), "--exclude is empty: leave it out, or give"),
    "a misspelt exclusion": (
        (*INIT, *TEXT, "--exclude", "q_proj,v_porj"),
        "no linear layer matches exclude ['v_porj']",
    ),
    "an exclusion of everything": (
        (*INIT, *TEXT, "--targets", "q_proj", "--exclude", "q_proj"),
        "exclude ['q_proj'] leaves no layer of the targets",
    ),
    "hold": (
        (*INIT, *TEXT, "--hold", 0),
        "hold must be positive and finite, such as 1 or 16, got 0",
    ),
    "hold of the published form": (
        (*INIT, *TEXT, "--residual", "weight", "--hold", 8),
        'residual="weight" goes with neither hold, use_dora nor lora_dropout',
    ),
    "a base to store that stays as it is": (
        (*INIT, *TEXT, "--save-base"),
        "--save-base goes with --residual weight, which changes the base",
    ),
    "damping": ((*INIT, *TEXT, "--damping", -1), "damping must be at least 0 and finite"),
    "dtype": ((*INIT, *TEXT, "--dtype", "int8"), "dtype 'int8' is not one of float32"),
    "device": (
        (*INIT, *TEXT, "--device", "nowhere"),
        "there is no device 'nowhere': choose cpu or cuda",
    ),
    "NaN in the weights": (
        ("init", "{place}/nan", "{tmp}/out", "--mode", "ipm", *TEXT, *SMALL),
        "layer model.layers.0.self_attn.o_proj received NaN or Inf in 2 of 32 channels in batch 0",
    ),
    "NaN while calibrating": (
        ("calibrate", "{place}/nan", "{tmp}/out.safetensors", *TEXT, *SMALL),
        "layer model.layers.0.self_attn.o_proj received NaN or Inf",
    ),
    "neither data nor covariances": (INIT, "give exactly one of --data, --cov and --mix"),
    "data and covariances": (
        (*INIT, *TEXT, "--cov", "{tmp}/c"),
        "give exactly one of --data, --cov and --mix",
    ),
    "covariances and a mixture": (
        (*INIT, "--cov", "{tmp}/c", "--mix", "{tmp}/c=1"),
        "give exactly one of --data, --cov and --mix",
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
        "--candidates and --memory-limit are about text (--data): leave them out",
    ),
    "budget": (
        (*INIT, *TEXT, "--budget", "lots"),
        "'lots' is not a budget: write a number of parameters",
    ),
    "bounds without a budget": ((*INIT, *TEXT, "--max-rank", 8), 'such as budget="r=32"'),
    "no covariances": ((*INIT, "--cov", "{tmp}/none"), "{tmp}/none: no such covariance file"),
    "output below a file": (
        ("init", "{place}/model", "{place}/text.txt/out", "--mode", "ipm", *TEXT, *SMALL),
        "cannot write {place}/text.txt/out: Not a directory; nothing that was there before has",
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
        "cannot write {place}/text.txt/out: Not a directory; ",
    ),
    "memory limit": (
        (*INIT, *TEXT, "--memory-limit", "much"),
        "'much' is not a size: write bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB",
    ),
    "memory limit of covariances": (
        (*INIT, "--cov", "{tmp}/c", "--memory-limit", "1GB"),
        "--memory-limit are about text (--data): leave them out with --cov and --mix",
    ),
    "a budget by block": (
        (*INIT, *TEXT, "--budget", "r=4", "--memory-limit", "1KB"),
        "a budget needs the covariances of all layers at once: raise the memory limit to",
    ),
    "rank of the stability": (
        ("calibrate", "{place}/model", "{tmp}/out", *TEXT, *SMALL, "--rank", 0),
        "rank must be a whole number of at least 1, got 0",
    ),
    "damping of the stability": (
        ("calibrate", "{place}/model", "{tmp}/out", *TEXT, *SMALL, "--damping", -1),
        "damping must be at least 0 and finite, and no larger than 4.5e15, got -1",
    ),
    "a model where the adapter should go": (
        ("init", "{place}/model", "{place}/model", "--mode", "ipm", *TEXT),
        "{place}/model holds a model, which would be loaded with the adapter on it",
    ),
    "options of a text that is not given": (
        (*INIT, "--cov", "{tmp}/c", "--template", "Q: {{question}}"),
        "--field, --template, --chat-template, --answers-only, --candidates and --memory-limit",
    ),
    "a misspelt ending": (
        (*INIT, *TEXT, "--targets", "q_proj,v_porj"),
        "no linear layer matches targets ['v_porj']",
    ),
    "a seed beyond 64 bits": (
        (*INIT, *TEXT, "--seed", 10**20),
        "seed must be a whole number from -",
    ),
    "resuming without checkpoints": (
        ("calibrate", "{place}/model", "{tmp}/out", *TEXT, "--checkpoint-every", 0, "--resume"),
        "--resume continues from a checkpoint, and --checkpoint-every 0 writes none: leave one",
    ),
    "inspect nothing": (("inspect", "{tmp}/none"), "{tmp}/none: no such file or folder"),
    "inspect a text": (("inspect", "{place}/text.txt"), "{place}/text.txt is truncated or not a"),
    "inspect a model": (("inspect", "{place}/model"), "{place}/model has no corda.json"),
    "export nothing": (("export", "{tmp}/none", "{tmp}/out"), "{tmp}/none: no such adapter folder"),
    "export a model": (
        ("export", "{place}/model", "{tmp}/out"),
        "{place}/model has no adapter_config.json: it is no adapter",
    ),
    "export at no rank": (
        ("export", "{tmp}/none", "{tmp}/out", "--rank", 0),
        "the rank of an export must be a whole number of at least 1, got 0",
    ),
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


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("calibrate", (), "; --resume continues from the last checkpoint"),
        ("init", ("--mode", "kpm"), ""),
    ],
    ids=["calibrate", "init"],
)
def test_an_interruption_is_one_line(
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    tmp_path: Path,
    name: str,
    options: tuple[str, ...],
    hint: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("corda_kernels.models.load_model", interrupted)
    text = ("--data", place / "text.txt", *options)
    status, out, lines = command(name, place / "model", tmp_path / "out", *text)
    assert (status, out) == (130, "")
    assert lines[-1] == f"interrupted: no file is half written{hint}"
    assert not list(tmp_path.iterdir())


def test_a_world_size_that_is_no_number_is_one_line(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    for arguments in (INIT, ("calibrate", "{place}/model", "{tmp}/out", *SMALL)):
        filled = [str(a).format(place=place, tmp=tmp_path) for a in arguments]
        status, out, lines = command(*filled, "--data", place / "text.txt")
        assert (status, out, len(lines)) == (2, "", 1), lines
        assert lines[0].startswith("rank 0: error: the ranks cannot be joined")
    assert not list(tmp_path.iterdir())


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

    forward = LlamaModel.forward

    def run(self: LlamaModel, *args: Any, **given: Any) -> Any:
        if given["input_ids"].numel() > 8:  # fewer tell the sizes
            pytest.fail("the model ran")
        return forward(self, *args, **given)

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 5000, 5000))
    monkeypatch.setattr("transformers.LlamaModel.forward", run)
    status, _, lines = command(*(str(argument).format(**names) for argument in arguments))
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {names['out']} needs about ")
    assert "but only 4.9 KiB is free there: free some space or choose another" in lines[0]
    assert not names["out"].exists()
