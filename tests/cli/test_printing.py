"""Names out of files steer no terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import corda_kernels.cli
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.cli.printing import echo, show
from corda_kernels.report.table import Table

NAME = "l.0\x1b]0;title\x07\x1b[2J\x9b1m\u202e\r"


@pytest.mark.parametrize("err", [False, True])
def test_what_does_not_print_is_escaped(capsys: pytest.CaptureFixture[str], err: bool) -> None:
    echo(f"σ {NAME}\n\tend", err=err)
    shown = r"σ l.0\x1b]0;title\x07\x1b[2J\x9b1m\u202e\r\n\tend" + "\n"
    assert capsys.readouterr() == (("", shown) if err else (shown, ""))


def test_a_table_in_a_log_is_plain_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "20"}.items():
        monkeypatch.setenv(name, value)
    long = 40 * "model.layers."
    rows = ((long, "1", "7"), ("[red]a[/red] :smile:", "22", ""), (NAME, "", "3"))
    show(Table(f"title {NAME}", ("layer", "[b]n", "x"), rows, ("note",)))
    title, head, *shown, note = capsys.readouterr().out.splitlines()
    assert (title, note) == (r"title l.0\x1b]0;title\x07\x1b[2J\x9b1m\u202e\r", "note")
    assert head.split() == ["layer", "[b]n", "x"]
    assert [line.split() for line in shown] == [
        [long, "1", "7"],
        ["[red]a[/red]", ":smile:", "22"],
        [r"l.0\x1b]0;title\x07\x1b[2J\x9b1m\u202e\r", "3"],
    ]
    assert {len(line) for line in (head, *shown)} == {len(long) + len("  [b]n  x")}


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
