"""The most memory that was in use: by this process on a CPU, from torch's allocator on a GPU."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_CPU = torch.device("cpu")


def has_own_memory(device: torch.device) -> bool:
    """Whether a device's memory can run out and leave the host's intact."""
    return device.type != "cpu"


def can_forget_peak(device: torch.device = _CPU) -> bool:
    """Whether `forget_peak` does anything; of a process only Linux forgets it."""
    return device.type == "cuda" or _RESET.exists()


def forget_peak(device: torch.device = _CPU) -> None:
    """Makes the peak what is in use now; loading a model may have taken more for a moment."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _RESET.write_text("5", encoding="ascii")


def peak_bytes(device: torch.device = _CPU) -> int:
    """The most bytes in use since `forget_peak`, or since the process began where that is deaf.

    It is 0 where the system does not tell. On Linux it comes from VmHWM, for ru_maxrss starts at
    what the parent held when it made this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = _status("VmHWM")
    if size is not None:
        return size
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
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


def used_bytes(device: torch.device = _CPU) -> int:
    """Bytes in use now; the peak where the system tells no more than that."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    size = _status("VmRSS")
    return peak_bytes() if size is None else size


def free_bytes(device: torch.device = _CPU) -> int:
    """Bytes that are not in use, those included that torch's allocator holds for later."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status(field: str) -> int | None:
    """A size in Linux's account of this process, in bytes; None on other systems."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return None
