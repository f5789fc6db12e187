from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from corda_kernels.bench import pipeline
from corda_kernels.bench.pipeline import PipelineRow, Task, bench_pipeline
from corda_kernels.cli import main
from corda_kernels.errors import CordaError
from corda_kernels.usage import peak_bytes


@pytest.fixture
def task(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Task:
    tiny_model("llama", initializer_range=0.1).save_pretrained(tmp_path / "model")
    batches = list(torch.randint(3, 64, (6, 1, 24)))
    return Task(str(tmp_path / "model"), batches, "ipm", 4)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants run in this process: starting others takes seconds."""
    monkeypatch.setattr(pipeline, "_in_child", pipeline.run)


@pytest.mark.usefixtures("_here")
def test_contestants_compute_the_same(task: Task) -> None:
    peft, patched, ours = bench_pipeline(task)
    assert [row.name for row in (peft, patched, ours)] == ["peft", "patch_peft", "init_corda"]
    for row in (peft, patched, ours):
        assert row.seconds > 0
        assert row.beyond == row.seconds - row.forward
    assert patched.overlap == pytest.approx(1, abs=1e-4)
    assert patched.passed


@pytest.mark.usefixtures("_here")
def test_a_contestant_that_computes_something_else_has_no_speed(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = pipeline._contestant

    def other_end(name: str, model: nn.Module, task: Task, *rest: object) -> Callable[[], object]:
        if name == "patch_peft":
            task = Task(task.model, task.batches, "kpm", task.rank)
        return real(name, model, task, *rest)

    monkeypatch.setattr(pipeline, "_contestant", other_end)
    command_module = sys.modules["corda_kernels.cli.bench"]  # its name in cli is the command
    monkeypatch.setattr(command_module, "_sequences", lambda *_: task.batches)
    out = tmp_path / "results.json"
    command = f"corda-kernels bench pipeline {task.model} --rank 4 --json {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "patch_peft   computes something else" in printed
    rows = {row["name"]: row for row in json.loads(out.read_text())["pipeline"]}
    assert rows["patch_peft"]["passed"] is False
    assert rows["init_corda"]["passed"] is True


def test_a_childs_failure_is_told(task: Task) -> None:
    broken = Task(task.model, [torch.tensor([[1000]])], "ipm", 4)
    with pytest.raises(CordaError, match="the run of init_corda failed: IndexError"):
        bench_pipeline(broken, ("init_corda",))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_that_since_it_was_forgotten() -> None:
    size = 256 << 20
    torch.ones(size // 4)
    pipeline._forget_peak()
    before = peak_bytes()
    assert peak_bytes() - before < size / 8
    torch.ones(size // 4)
    assert size * 0.9 < peak_bytes() - before < size * 1.2


def test_growth_and_time_are_written(tmp_path: Path) -> None:
    row = PipelineRow("peft", 10.0, 4.0, 1 << 20)
    assert row.to_json() == {
        "name": "peft",
        "seconds": 10.0,
        "forward": 4.0,
        "growth": 1 << 20,
        "overlap": None,
        "passed": True,
        "beyond": 6.0,
    }


def test_unknown_contestants_are_refused(
    task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--only mine", "--mode both"):
        monkeypatch.setattr(
            sys, "argv", f"corda-kernels bench pipeline {task.model} {option}".split()
        )
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert "--mode must be ipm or kpm and --only of peft" in capsys.readouterr().err
