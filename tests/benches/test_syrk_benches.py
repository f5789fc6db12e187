"""benches/syrk_experiment.py and benches/syrk_host.py in small sizes, on a CPU."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import syrk_experiment
import syrk_host
import torch

CPU = torch.device("cpu")


def test_a_kernel_that_is_wrong_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(syrk_experiment, "SHAPES", ((96, 40),))
    assert syrk_experiment.check("cpu", CPU) == 0
    right = syrk_experiment.add

    def wrong(kernel: str, c: Any, x: Any, absmax: Any, count: Any, **options: Any) -> None:
        right("cpu", c, x, absmax, count, **options)
        {"sums": c, "absmax": absmax, "counts": count}[kernel][7:8] += 1

    monkeypatch.setattr(syrk_experiment, "add", wrong)
    for kernel in ("sums", "absmax", "counts"):
        assert syrk_experiment.check(kernel, CPU) == 1
    assert "WRONG" in capsys.readouterr().out


def test_what_is_wrong_or_missing_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    command = ["", "--device", "cpu", "--widths", "16", "--tokens", "32", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--kernels", "sm90,cpu,reference"])
    codes = {"cpu": 1, "reference": 0}
    ran = types.SimpleNamespace(
        run=lambda command, timeout: types.SimpleNamespace(returncode=codes[command[3]]),
        TimeoutExpired=TimeoutError,
    )
    monkeypatch.setattr(syrk_experiment, "subprocess", ran)
    monkeypatch.setattr(syrk_experiment.Experiment, "alone", lambda *_: 1e-3)
    monkeypatch.setattr(syrk_experiment.Experiment, "back_to_back", lambda *_: 2e-3)
    assert syrk_experiment.main() == 0
    *checks, alone, heavy = json.loads(out.read_text())["rows"]
    assert [check.get("right") for check in checks] == [None, False, True]
    assert list(alone["ms"]) == list(heavy["ms"]) == ["addmm", "reference", "reference plain"]


def test_a_call_is_timed_with_the_driver_stubbed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["", "--width", "64", "--tokens", "64", "--json", str(out)])
    monkeypatch.setattr(syrk_host, "ROUNDS", 2)
    syrk_host.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["backend"] == "sm90"
    assert row["stubbed"]
    assert 0 < row["best"] <= row["median"] < row["first"]
