"""Arithmetic in the dtypes that it was written for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Products inside keep their dtype, also where a caller trains under torch.autocast."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield
