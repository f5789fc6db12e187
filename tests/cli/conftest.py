"""What tests of the command line share: a place with models and texts, and two ways to run it."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from corda_kernels.cli import app, main

WORDS = [f"w{index}" for index in range(60)]


@pytest.fixture(scope="session")
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
