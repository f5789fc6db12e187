"""Timing a call: warmed up, repeated, as quantiles; and what it ran on."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from corda_kernels.versions import library_versions

_MAX_REPEATS = 100
_BUDGET_S = {"cpu": 2.0, "cuda": 0.2}
_BUSY_CYCLES = 3_000_000  # about two milliseconds


@dataclass(frozen=True)
class Timing:
    """Quantiles of one call's duration, in seconds."""

    p20: float
    p50: float
    p80: float

    def milliseconds(self) -> str:
        """All three as columns of a table."""
        return " ".join(f"{1e3 * value:>9.3f}" for value in (self.p20, self.p50, self.p80))


def measure(
    run: Callable[[Any], object],
    inputs: list[Any],
    device: torch.device,
    *,
    repeats: int = 5,
    warm_up: int = 2,
    ahead: bool = False,
) -> Timing:
    """Times `run(input)` over the inputs in turn, until 2 seconds, of a GPU 0.2, or 100 calls are
    spent.

    Args:
        run: the call.
        inputs: one or more arguments to rotate through, so that none is still in a cache.
        device: a CUDA device is timed by its events.
        repeats: the least number of calls, however long they take; of one call all quantiles are
            its duration.
        warm_up: calls beforehand that do not count.
        ahead: keeps a CUDA device busy while the call is issued, as it is within a model, so that
            what the host takes for that does not count. For calls that do not wait for the device.
    """
    rotation = cycle(inputs)
    for _ in range(warm_up):
        run(next(rotation))
    durations: list[float] = []
    while len(durations) < repeats or (
        sum(durations) < _BUDGET_S[device.type] and len(durations) < _MAX_REPEATS
    ):
        durations.append(_seconds(run, next(rotation), device, ahead))
    if len(durations) == 1:
        return Timing(*(3 * durations))
    p20, _, _, p80 = statistics.quantiles(durations, n=5)
    return Timing(p20, statistics.median(durations), p80)


def _seconds(
    run: Callable[[Any], object], argument: object, device: torch.device, ahead: bool
) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run(argument)
        return time.perf_counter() - started
    event: Any = torch.cuda.Event  # whose methods have no types
    begin, end = event(enable_timing=True), event(enable_timing=True)
    if ahead:
        torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    run(argument)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the libraries that a measurement was made with."""
    about, cpu = Path("/proc/cpuinfo"), platform.processor()
    if about.exists():  # Linux says more than Python knows
        found = re.search(r"^model name\s*:\s*(.+)$", about.read_text(encoding="utf-8"), re.M)
        cpu = found[1].strip() if found else cpu
    described: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores of "
        f"{cpu or 'an unknown CPU'} ({torch.backends.cpu.get_cpu_capability()})",
        "python": platform.python_version(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
        described["clock_mhz"] = torch.cuda.clock_rate(device)
    return described
