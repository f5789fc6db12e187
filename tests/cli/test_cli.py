"""What all commands have in common: help, usage, warnings, tracebacks; and `doctor`."""

from __future__ import annotations

import importlib.metadata
import io
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_text import SMALL

import corda_kernels
from corda_kernels.cli import main
from corda_kernels.errors import DataError
from corda_kernels.kernels import available_backends

COMMANDS = ("demo", "plan", "init", "calibrate", "inspect", "export", "merge", "doctor")


def test_help_names_every_command(invoke: Callable[..., str]) -> None:
    shown = invoke("--help")
    for name in COMMANDS:
        assert name in shown
        assert f"corda-kernels {name}" in invoke(name, "--help")  # an example
    assert invoke("--version") == f"corda_kernels {corda_kernels.__version__}\n"


def test_doctor_shows_versions_and_backends(invoke: Callable[..., str]) -> None:
    shown = dict(re.split(r"\s{2,}", line) for line in invoke("doctor").splitlines())
    assert shown["corda_kernels"] == corda_kernels.__version__
    assert shown["torch"] == importlib.metadata.version("torch")
    for backend in available_backends():
        assert shown[f"backend {backend}"].startswith(("ready", "no: "))


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


def test_a_rank_without_other_ranks_writes_and_prints(
    invoke: Callable[..., str], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    """A job scheduler sets RANK where nothing is distributed, too."""
    monkeypatch.setenv("RANK", "3")
    data = ("--data", place / "text.txt", *SMALL)
    shown = invoke("calibrate", place / "model", tmp_path / "covariances", *data)
    assert f"{tmp_path / 'covariances'}: 14 layers" in shown
    shown = invoke("init", place / "model", tmp_path / "adapter", "--mode", "ipm", *data)
    assert f"{tmp_path / 'adapter'}: IPM adapter" in shown


@pytest.mark.parametrize("position", [0, 1, -1])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, position: int
) -> None:
    arguments = ["init", place / "model", tmp_path, "--mode", "ipm", "--data", tmp_path / "none"]
    arguments.insert(position % (len(arguments) + 1), "--debug")
    monkeypatch.setattr(sys, "argv", ["corda-kernels", *map(str, arguments)])
    with pytest.raises(DataError, match="no such data file"):
        main()


def test_an_unexpected_error_is_one_line_that_asks_for_a_report(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise ValueError("too\nmany")

    monkeypatch.setattr(torch, "get_num_threads", fail)
    status, out, lines = command("doctor")
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: unexpected ValueError: too many; run again with --debug to")
    monkeypatch.setattr(sys, "argv", ["corda-kernels", "doctor", "--debug"])
    with pytest.raises(ValueError, match="too\nmany"):
        main()


def test_a_terminal_without_greek_letters_shows_what_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "cp1252"))
    monkeypatch.setattr(sys, "argv", ["corda-kernels", "init", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    assert ended.value.code == 0
    assert b"published form, for which the base becomes W ? BA" in b" ".join(
        shown.getvalue().split()
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("init", "model", "out"), "--mode"),
        (("init", "model", "out", "--mode", "both"), "--mode"),
        (("init", "model", "out", "--mode", "ipm", "--rank", "x"), "--rank"),
        (("init", "model", "out", "--mode", "ipm", "--residual", "pair"), "--residual"),
        (("init", "model", "out", "--mode", "ipm", "--hold", "x"), "--hold"),
        (("calibrate", "model", "out"), "--data"),
        (("calibrate", "m", "o", "--data", "d", "--checkpoint-every", "-1"), "--checkpoint-every"),
        (("init", "model", "out", "--mode", "ipm", "--samples", "0"), "--samples"),
        (("calibrate", "m", "o", "--data", "d", "--candidates", "0"), "--candidates"),
        (("plan", "model", "--samples", "0"), "--samples"),
        (("plan", "model", "--seq-len", "0"), "--seq-len"),
        (("demo", "--steps", "0"), "--steps"),
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
