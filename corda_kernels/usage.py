"""What work takes: seconds by stage, and the most memory that the process has held."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Adds up how long each stage took; what a stage spends in another counts for that one only.

    Attributes:
        seconds: by stage, in the order in which they first began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time inside the block for stage `name`."""
        self._count()
        self.seconds.setdefault(name, 0.0)
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def each(self, name: str, work: Iterable[T]) -> Iterator[T]:
        """Iterates over `work`, counting for stage `name` the time that its items take to come."""
        pending = iter(work)
        while True:
            with self.stage(name):
                try:
                    item = next(pending)
                except StopIteration:
                    return
            yield item
            del item  # before the next one is made

    def _count(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # a GPU is still at work when a call returns
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def peak_bytes() -> int | None:
    """The most bytes that this process has held in memory; None where the system does not tell.

    On Linux from VmHWM: ru_maxrss starts at what the parent held when it made this process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def cuda_peak_bytes() -> dict[str, int]:
    """The most bytes that torch has held on each GPU that this process uses, by device."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    peaks = {
        f"cuda:{index}": torch.cuda.max_memory_allocated(index)
        for index in range(torch.cuda.device_count())
    }
    return {device: peak for device, peak in peaks.items() if peak}
