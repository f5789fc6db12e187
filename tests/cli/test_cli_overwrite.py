"""A result is replaced only where that is asked for, and else refused before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--samples", 4, "--seq-len", 16, "--no-stability")


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.rglob("*")
    return {str(file): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("kind", ["init", "export", "merge", "calibrate"])
def test_a_result_is_replaced_on_demand_alone(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    place: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    out, model = tmp_path / "out", place / "model"
    text = ("--data", place / "text.txt", *SMALL)
    init = ("--mode", "ipm", "--rank", 2, *text)
    if kind in ("export", "merge"):
        invoke("init", model, tmp_path / "adapter", *init)
    run, broken = {
        "init": (("init", model, out, *init), ("init", "no-model", out, *init)),
        "export": (("export", tmp_path / "adapter", out),) * 2,
        "merge": (("merge", tmp_path / "adapter", out),) * 2,
        "calibrate": (("calibrate", model, out, *text), ("calibrate", "no-model", out, *text)),
    }[kind]
    invoke(*run)
    before = contents(out)
    if out.is_dir():
        (out / "notes").write_text("of somebody")
    status, _, lines = command(*broken)
    assert (status, len(lines)) == (2, 1)
    assert "is there already: choose another path, or give --overwrite" in lines[0]
    assert before.items() <= contents(out).items()
    invoke(*run, "--overwrite")
    assert contents(out).keys() - before.keys() == ({str(out / "notes")} if out.is_dir() else set())
