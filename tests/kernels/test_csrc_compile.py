"""Machine code of csrc/ for three architectures: needs nvcc, but no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from corda_kernels.kernels import cuda

HOME = os.environ.get("CUDA_HOME")
NVCC = (HOME and shutil.which("nvcc", path=str(Path(HOME, "bin")))) or shutil.which("nvcc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="needs nvcc, on PATH or in CUDA_HOME"),
]

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # of a block, by architecture
REGISTERS = 65_536  # of a multiprocessor
WARP_REGISTERS = 256  # what a warp gets is a multiple of this
THREADS = {f"jacobi_svd_{cuda._suffix(dtype)}": n for dtype, n in cuda._SVD_THREADS.items()}


def report(
    sources: Path, output: Path, architectures: tuple[int, ...] = tuple(SHARED_BYTES)
) -> list[tuple[str, int, int, int]]:
    """Kernel, architecture, registers, and bytes of stack and spills, as ptxas reports them."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-fatbin", "-o", str(output)]
    for number in architectures:
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    command.append(str(sources / "kernels.cu"))
    done = subprocess.run(command, capture_output=True, text=True)
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
    found = report(cuda.sources(), tmp_path / "code")
    assert {(name, architecture) for name, architecture, *_ in found} == {
        (name, architecture) for name in THREADS for architecture in SHARED_BYTES
    }
    for name, architecture, registers, memory in found:
        assert memory == 0, f"{name} spills on sm_{architecture}"
        warp = -(-registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
        assert warp * THREADS[name] // 32 <= REGISTERS, f"{name} on sm_{architecture}"


def test_a_spill_is_noticed(tmp_path: Path) -> None:
    for path in cuda.sources().glob("*.cu*"):
        text = path.read_text(encoding="utf-8")
        tmp_path.joinpath(path.name).write_text(
            text.replace("CORDA_KERNEL(768)", "CORDA_KERNEL(1024)")
        )
    found = report(tmp_path, tmp_path / "code", (100,))
    assert any(memory for name, _, _, memory in found if name == "jacobi_svd_float64")


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float32, (202, 239, 239)), (torch.float64, (143, 169, 169))],
    ids=str,
)
def test_sizes_that_the_documentation_names_fit(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    for limit, l in zip(SHARED_BYTES.values(), sizes, strict=True):
        assert cuda.svd_shared_bytes(l, dtype) <= limit
        assert cuda.svd_shared_bytes(l + 1, dtype) > limit
        assert l <= cuda._SVD_ROWS[dtype]
