"""Names out of files steer no terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import corda_kernels.cli
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.cli.printing import echo

NAME = "l.0\x1b]0;title\x07\x1b[2J\x9b1m\u202e\r"


@pytest.mark.parametrize("err", [False, True])
def test_what_does_not_print_is_escaped(capsys: pytest.CaptureFixture[str], err: bool) -> None:
    echo(f"σ {NAME}\n\tend", err=err)
    shown = r"σ l.0\x1b]0;title\x07\x1b[2J\x9b1m\u202e\r\n\tend" + "\n"
    assert capsys.readouterr() == (("", shown) if err else (shown, ""))


def test_names_in_a_covariance_file_are_escaped(invoke: Callable[..., str], tmp_path: Path) -> None:
    zeros = torch.zeros(8, dtype=torch.int64)
    covariance = Covariance(torch.eye(8), 20, 1, torch.ones(8), zeros, 6.0)
    CovarianceSet(
        {NAME: covariance},
        left_out={f"out{NAME}": f"reason{NAME}"},
        provenance={"model": f"model{NAME}", f"note{NAME}": {"a": NAME}},
    ).save(tmp_path / "c")
    shown = invoke("inspect", tmp_path / "c")
    assert all(line.isprintable() for line in shown.split("\n"))
    for name in ("", "out", "reason", "model", "note"):
        assert rf"{name}l.0\x1b]0;title" in shown


def test_names_in_an_error_are_escaped(command: Callable[..., Any], tmp_path: Path) -> None:
    status, _, lines = command("inspect", tmp_path / NAME.replace("\r", ""))
    assert status == 2
    assert all(line.isprintable() for line in lines)
    assert r"\x1b[2J" in lines[0]


def test_the_command_line_prints_in_one_place() -> None:
    folder = Path(corda_kernels.cli.__file__).parent
    callers = [
        file.name
        for file in folder.glob("*.py")
        if "typer.echo(" in file.read_text() or " print(" in file.read_text()
    ]
    assert callers == ["printing.py"]
