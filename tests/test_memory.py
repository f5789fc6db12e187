from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

from corda_kernels import memory

SIZE = 256 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def taken() -> mmap.mmap:
    """SIZE bytes fresh from the system: an allocator may have as many left over from other work."""
    block = mmap.mmap(-1, SIZE)
    for page in range(0, SIZE, mmap.PAGESIZE):
        block[page] = 1
    return block


@linux
def test_the_peak_is_that_since_it_was_forgotten() -> None:
    taken().close()
    memory.forget_peak()
    before = memory.peak_bytes()
    assert memory.peak_bytes() - before < SIZE / 8
    taken().close()
    assert SIZE * 0.9 < memory.peak_bytes() - before < SIZE * 1.2


@linux
def test_what_is_in_use_falls_again_and_the_peak_does_not() -> None:
    before = memory.used_bytes()
    block = taken()
    assert SIZE * 0.9 < memory.used_bytes() - before < SIZE * 1.2
    block.close()
    assert memory.used_bytes() - before < SIZE / 8
    assert memory.peak_bytes() - before > SIZE * 0.9


def test_a_system_without_proc_still_tells_the_peak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_RESET", tmp_path / "absent" / "clear_refs")
    assert not memory.can_forget_peak()
    memory.forget_peak()
    assert memory.peak_bytes() > 50 << 20
    assert memory.used_bytes() == memory.peak_bytes()


@linux
def test_free_memory_of_a_cpu_is_part_of_all_memory() -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 20 < memory.free_bytes() < whole


def test_memory_that_torch_holds_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.free_bytes(torch.device("cuda")) == 1200


def test_gpus_in_use_have_a_peak_each() -> None:
    assert all(size > 0 for size in memory.cuda_peak_bytes().values())
    assert torch.cuda.is_available() or memory.cuda_peak_bytes() == {}


def test_a_system_that_does_not_tell_says_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_bytes() == 0


def test_a_process_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_bytes("Name:\tgröße\nVmRSS:\t    12 kB\n".encode())
    monkeypatch.setattr(memory, "_STATUS", status)
    assert memory.used_bytes() == 12 * 1024
