from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from corda_kernels.bench import covariance
from corda_kernels.bench.timing import measure
from corda_kernels.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corda_kernels.bench.timing._BUDGET_S", {"cpu": 0.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_is_compared_with_the_baseline(dtype: torch.dtype) -> None:
    rows = list(covariance.bench_syrk(300, 40, dtype, CPU))
    assert [row.backend for row in rows] == ["addmm", "reference", "cpu"]
    assert rows[0].speedup == 1.0
    for row in rows:
        assert row.passed
        assert row.timing is not None
        assert row.timing.p20 <= row.timing.p50 <= row.timing.p80
        assert row.speedup == pytest.approx(rows[0].timing.p50 / row.timing.p50)
        assert row.tflops == pytest.approx(300 * 40 * 41 / row.timing.p50 / 1e12)


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "syrk_", lambda c, x, **_: c.addmm_(x.T, x, alpha=1.001))
    first, *others = covariance.bench_syrk(300, 40, torch.float32, CPU)
    assert first.passed
    for row in others:
        assert not row.passed
        assert (row.timing, row.speedup, row.tflops) == (None, None, None)
        assert row.error == pytest.approx(1e-3, rel=1e-2)


def test_a_baseline_is_timed_however_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "addmm_baseline", lambda c, x: c.addmm_(x.T, x, alpha=1.001))
    first, *others = covariance.bench_syrk(300, 40, torch.float32, CPU)
    assert not first.passed
    assert first.speedup == 1.0
    for row in others:
        assert row.passed
        assert row.speedup == pytest.approx(first.timing.p50 / row.timing.p50)


def test_inputs_rotate_and_calls_are_repeated() -> None:
    seen: list[int] = []
    measure(seen.append, [1, 2, 3], CPU)
    assert seen == [1, 2, 3, 1, 2, 3, 1]


def bench(monkeypatch: pytest.MonkeyPatch, options: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["corda-kernels", "bench", "covariance", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_command_prints_a_table_and_writes_all_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    assert bench(monkeypatch, f"--dims 20,33 --tokens 50 --device cpu --json {out}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "versions" in lines[0]
    assert len(lines) == 2 + 2 * 2 * 3
    assert {line.split()[0] for line in lines[2:]} == {"addmm", "reference", "cpu"}
    results: dict[str, Any] = json.loads(out.read_text())
    assert {(row["channels"], row["dtype"]) for row in results["syrk"]} == {
        (20, "float32"),
        (33, "float32"),
        (20, "bfloat16"),
        (33, "bfloat16"),
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dims 20,big", "--dims must be numbers from 1 on, separated by commas"),
        ("--dims 20,0", "--dims must be numbers from 1 on, separated by commas"),
        ("--dims 20 --tokens 0", "--tokens must be a whole number of at least 1, got 0"),
        ("--dims 20 --dtypes float32,int3", "dtype 'int3' is not one of float32"),
        ("--dims 20 --device meta", "--device 'meta' is not there"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    assert bench(monkeypatch, options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {said}")


def test_who_stops_it_keeps_the_rows_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = covariance.bench_syrk

    def stopped_at_33(tokens: int, width: int, *more: Any) -> Any:
        if width == 33:
            raise KeyboardInterrupt
        return whole(tokens, width, *more)

    monkeypatch.setattr(covariance, "bench_syrk", stopped_at_33)
    out = tmp_path / "results.json"
    bench(monkeypatch, f"--dims 20,33 --tokens 50 --device cpu --json {out}")
    assert {row["channels"] for row in json.loads(out.read_text())["syrk"]} == {20}


def test_calibration_of_a_model_is_measured_around_its_forward_pass(
    tmp_path: Path,
    tiny_model: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model("llama", max_position_embeddings=512).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(covariance, "measure", measured_once)
    out = tmp_path / "results.json"
    options = f"--dims 20 --tokens 50 --dtypes float32 --device cpu --model {tmp_path / 'model'}"
    assert bench(monkeypatch, f"{options} --json {out}") == 0
    found = json.loads(out.read_text())["calibration"]
    assert list(found) == ["model", "tokens", "forward", "calibration", "ratio"]
    assert found["tokens"] == 16 * 512
    assert found["ratio"] == found["calibration"]["p50"] / found["forward"]["p50"]
    assert f"ratio {found['ratio']:.2f}" in capsys.readouterr().out


def measured_once(run: Any, inputs: list[Any], device: torch.device, **_: Any) -> Any:
    return measure(run, inputs, device, repeats=1, warm_up=0)
