from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterable
from typing import Any

import decomposition_memory
import pytest
import svd
import torch
from decomposition_memory import bound, measured, print_growth
from svd_cases import ENDS, Case, make_case

from corda_kernels.linalg import End
from corda_kernels.memory import can_forget_peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [[(24, 24), (8, 24)], [(40, 24)], [(24, 40)]]
    monkeypatch.setattr("svd_cases._BLOCKS", {"smollm2-block": (1, shapes)})


def test_the_bound_is_of_the_largest_groups() -> None:
    case = make_case("smollm2-block", CPU, 4)
    first, second, third = 24 * 24 + 32 * 24, 24 * 24 + 40 * 24, 40 * 40 + 24 * 40
    assert bound(case, 1) == 3 * 8 * max(first, second, third)
    assert bound(case, 2) == 3 * 8 * (third + max(first, second))


@pytest.mark.skipif(not can_forget_peak(), reason="needs /proc")
def test_growth_is_the_peak_and_not_what_remains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ours(case: Case, ends: Iterable[End]) -> svd.Parts:
        assert list(ends) == ["smallest"]
        torch.ones(64 << 20, dtype=torch.uint8)
        return {}

    monkeypatch.setattr(decomposition_memory, "ours", ours)
    print_growth("smollm2-block", "smallest", 4, None)
    assert 60 << 20 < int(capsys.readouterr().out) < 80 << 20


@pytest.mark.skipif(not can_forget_peak(), reason="needs /proc")
def test_memory_is_measured_in_a_child_process_for_the_same_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def child(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="1048576\n")

    monkeypatch.setattr("subprocess.run", child)
    case = dataclasses.replace(make_case("smollm2-block", CPU, 4), name="some-model")
    largest, smallest = measured(case, CPU, ("folder", "file"))
    assert [json.loads(command[-1]) for command in commands] == [
        ["model", which, 4, ["folder", "file"]] for which in ENDS
    ]
    assert (largest["which"], smallest["which"]) == ENDS
    assert largest["grown"] == 1 << 20
