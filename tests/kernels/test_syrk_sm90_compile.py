"""Machine code of the kernel for compute capability 9.0: needs nvcc and nvdisasm, but no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from test_csrc_compile import NVCC, REGISTERS

from corda_kernels.kernels import cuda, syrk_sm90

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="needs nvcc, on PATH or in CUDA_HOME"),
]

NAMES = {syrk_sm90._name(dtype) + end for dtype in syrk_sm90._TYPES for end in ("", "_statistics")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The machine code, and what ptxas reports of it."""
    assert NVCC is not None
    output = tmp_path_factory.mktemp("sm90") / "kernel.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", "-o", str(output)]
    command += ["-gencode=arch=compute_90a,code=sm_90a", str(cuda.sources() / "syrk_sm90.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stderr


@pytest.fixture(scope="module")
def instructions(compiled: tuple[Path, str]) -> dict[str, list[str]]:
    """The instructions of each kernel, in order."""
    folders = [None]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    tools = [tool for folder in folders if (tool := shutil.which("nvdisasm", path=folder))]
    if not tools:
        pytest.skip("needs nvdisasm, on PATH or in the package triton")
    listing = subprocess.run([tools[0], "-c", compiled[0]], capture_output=True, text=True).stdout
    parts = re.split(r"^\s+\.section\s+\.text\.(\w+)", listing, flags=re.MULTILINE)
    return {
        name: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ;", text, re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_kernel_compiles_within_the_limits_and_without_spills(
    compiled: tuple[Path, str],
) -> None:
    report = compiled[1]
    assert "warning" not in report.lower(), report  # one says that products were serialised
    found = re.findall(
        r"entry function '(\w+)' for 'sm_90a'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == NAMES
    for name, *memory, registers in found:
        assert memory == ["0"] * 3, name
        assert int(registers) * syrk_sm90._THREADS <= REGISTERS
    # What the warpgroups have after they have exchanged registers.
    assert REGISTERS >= (72 + 2 * 216) * 128


def test_products_are_asynchronous(instructions: dict[str, list[str]]) -> None:
    assert instructions.keys() == NAMES
    for name, code in instructions.items():
        products = [line for line in code if "HGMMA" in line]
        assert products
        # Both operands come from shared memory. Only the last product of a step ends a group;
        # serialised, each would.
        assert all("HGMMA.64x256x16.F32" in line for line in products), name
        assert all("gdesc" in line and "tnspA.tnspB" in line for line in products), name
        assert all(("BF16" in line) == ("bfloat16" in name) for line in products)
        ends = ["gsb0" in line for line in products]
        assert ends == [False, False, False, True] * (len(products) // 4)
        waits = [line for line in code if "WARPGROUP.DEPBAR" in line]
        assert any("gsb0, 0x1" in line for line in waits), name
        # No wait for products, and no fence, between those of one step.
        first, last = (code.index(products[index]) for index in (0, 3))
        assert not any(re.search("DEPBAR|MEMBAR|CCTL|BAR.SYNC", line) for line in code[first:last])


def test_no_step_waits_for_the_whole_device(instructions: dict[str, list[str]]) -> None:
    # Fences of the device stand in the two meetings of the cluster only: an arrival at the other
    # block's barrier with .release.cluster has one in every step.
    for name, code in instructions.items():
        assert sum("MEMBAR.ALL.GPU" in line for line in code) == 2, name
        assert sum("UCGABAR_ARV" in line for line in code) == 2, name


def test_copies_are_bulk_copies(instructions: dict[str, list[str]]) -> None:
    for name, code in instructions.items():
        counted = Counter(re.findall(r"\b(UTMALDG\S*|UTMAREDG\S*|LDG|STG)\b", "\n".join(code)))
        assert counted == {"UTMALDG.2D": 2, "UTMALDG.2D.MULTICAST": 2, "UTMAREDG.2D.ADD": 8}, name
        assert not any("LDL" in line or "STL" in line for line in code)
        assert sum("USETMAXREG" in line for line in code) == 2
