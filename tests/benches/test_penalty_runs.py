from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import penalty
import pytest
import torch
from finetuning.data import Item
from torch import nn

from corda_kernels import CovarianceSet
from corda_kernels.files import write_json

pytestmark = pytest.mark.slow


@pytest.fixture
def experiment(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """What `do` asks of an experiment, on a tiny model."""
    profile = replace(penalty.PROFILE, rank=2, steps=4, batch_size=2)
    monkeypatch.setattr(penalty, "PROFILE", profile)
    model, covariances = calibrated()
    model.save_pretrained(tmp_path / "model")
    found = dict.fromkeys(penalty.MEASURES, torch.arange(4.0))
    write_json(tmp_path / "base.json", {name: {"mean": 1.5} for name in found} | {"items": {}})
    return SimpleNamespace(
        model=str(tmp_path / "model"),
        folder=tmp_path,
        base=lambda: found,
        covariances=lambda *_: covariances,
        training_problems=[Item([3 + i, 40 - i, 9], [50 - i, 7 + i]) for i in range(8)],
        examination=SimpleNamespace(take=lambda _: found),
    )


def test_a_strength_is_what_the_run_without_penalty_would_have_paid(
    experiment: Any, tmp_path: Path
) -> None:
    runs = [
        penalty.Run("kpm-published", 3e-4),
        penalty.Run("kpm-published", 3e-4, "drift", 1.0),
        penalty.Run("kpm-published", 3e-4, "compactness", 1.0),
    ]
    for run in runs:
        penalty.do(experiment, run)
    plain, *others = [
        json.loads(penalty.result_file(tmp_path, run).read_text(encoding="utf-8")) for run in runs
    ]
    assert plain["factor"] == 0
    for run in others:
        name = run["penalty"]
        assert run["factor"] == pytest.approx(1 / plain["penalties"][name])
        assert run["penalties"][name] < 0.99 * plain["penalties"][name]
        assert run["training_loss"][0] == plain["training_loss"][0]
    penalty.report(tmp_path, tmp_path / "table")
    text = (tmp_path / "table.txt").read_text(encoding="utf-8")
    rows = [line.split()[:4] for line in text.splitlines()[4:]]
    assert rows[1:] == [
        ["kpm-published", "0.0003", "none", "1.500"],
        ["kpm-published", "0.0003", "compactness", "1"],
        ["kpm-published", "0.0003", "drift", "1"],
    ]
    assert len(json.loads((tmp_path / "table.json").read_text())["runs"]) == 3


def test_a_run_comes_after_the_one_that_it_is_measured_by() -> None:
    for index, run in enumerate(penalty.RUNS):
        assert penalty.Run(run.method, run.learning_rate) in penalty.RUNS[: index + 1]
