from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch

from corda_kernels.usage import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A time that only moves when a test moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_stage_within_another_counts_for_itself_only(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch.stage("selection"):
        clock[0] += 1
        for _ in range(2):
            with watch.stage("calibration"):
                clock[0] += 10
            clock[0] += 2
    clock[0] += 1000
    with contextlib.suppress(KeyError), watch.stage("calibration"):
        clock[0] += 5
        raise KeyError
    with watch.stage("last"):
        clock[0] += 1
    assert watch.seconds == {"selection": 5, "calibration": 25, "last": 1}


def test_the_making_of_items_is_timed_and_their_use_is_not(clock: list[float]) -> None:
    def work() -> Iterator[int]:
        for item in range(3):
            clock[0] += 1
            yield item

    watch = Stopwatch()
    found = []
    for item in watch.each("blocks", work()):
        clock[0] += 100
        found.append(item)
    assert found == [0, 1, 2]
    assert watch.seconds == {"blocks": 3}


def test_only_the_gpus_that_work_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    host, gpu = torch.device("cpu"), torch.device("xpu:1")
    with Stopwatch([host, torch.device("meta")]).stage("calibration"):
        pass
    assert not waited
    with Stopwatch([gpu, host, gpu]).stage("calibration"):
        pass
    assert waited == [gpu, gpu]
