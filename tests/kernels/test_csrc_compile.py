"""Machine code of csrc/ for every architecture of the fatbin: needs nvcc, but no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from corda_kernels.kernels import cuda_batched, cuda_loader, fatbin

NVCC = fatbin.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, on PATH or in CUDA_HOME")

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # of a block
REGISTERS = 65_536  # of a multiprocessor
WARP_REGISTERS = 256  # what a warp gets is a multiple of this
THREADS = {
    "jacobi_svd_float32": cuda_batched._SVD_THREADS[torch.float32],
    "jacobi_svd_float64": cuda_batched._SVD_THREADS[torch.float64],
    "damped_cholesky_float32": cuda_batched._CHOLESKY_THREADS,
    "damped_cholesky_float64": cuda_batched._CHOLESKY_THREADS,
}


def report(
    sources: Path, output: Path, architectures: tuple[int, ...] = fatbin.ARCHITECTURES
) -> list[tuple[str, int, int, int]]:
    """Kernel, architecture, registers, and bytes of stack and spills, as ptxas reports them."""
    assert NVCC is not None
    command = fatbin.compile_command(NVCC, sources, output, architectures)
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    found = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return [
        (name, int(architecture), int(registers), sum(map(int, memory)))
        for name, architecture, *memory, registers in found
    ]


def test_every_kernel_compiles_within_the_limits_and_without_spills(tmp_path: Path) -> None:
    path = tmp_path / "kernels.fatbin"
    found = report(cuda_loader.sources(), path)
    assert path.stat().st_size > 0
    assert {(name, architecture) for name, architecture, *_ in found} == {
        (name, architecture) for name in THREADS for architecture in fatbin.ARCHITECTURES
    }
    for name, architecture, registers, memory in found:
        assert memory == 0, f"{name} spills on sm_{architecture}"
        warp = -(-registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
        assert warp * THREADS[name] // 32 <= REGISTERS, f"{name} on sm_{architecture}"


def test_a_spill_is_noticed(tmp_path: Path) -> None:
    for path in fatbin.source_files(cuda_loader.sources()):
        text = path.read_text(encoding="utf-8")
        tmp_path.joinpath(path.name).write_text(
            text.replace("CORDA_KERNEL(768)", "CORDA_KERNEL(1024)")
        )
    found = report(tmp_path, tmp_path / "kernels.fatbin", (100,))
    assert any(memory for name, _, _, memory in found if name == "jacobi_svd_float64")


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float32, (202, 239, 239)), (torch.float64, (143, 169, 169))],
    ids=str,
)
def test_sizes_that_the_documentation_names_fit(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    for limit, l in zip(SHARED_BYTES.values(), sizes, strict=True):
        assert cuda_batched.svd_shared_bytes(l, dtype) <= limit
        assert cuda_batched.svd_shared_bytes(l + 1, dtype) > limit
        assert l <= cuda_batched._SVD_ROWS[dtype]
