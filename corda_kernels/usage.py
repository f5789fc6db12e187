"""What work takes: seconds by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Adds up how long each stage took; what a stage spends in another counts for that one only.

    Args:
        devices: that the work is on. GPUs among them are waited for wherever a stage begins or
            ends, for they are still at work when a call returns; no other one is.

    Attributes:
        seconds: by stage, in the order in which they first began.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._gpus = {device for device in devices if device.type not in ("cpu", "meta")}
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
        for device in self._gpus:
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
