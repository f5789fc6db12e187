"""Compiles every configuration of the Triton kernels ahead of time and checks the machine code.

Needs no GPU. Prints one line for each configuration and exits with status 1 if one of them spills
registers, needs more shared memory than its architecture has, or, on Hopper, does not feed the
tensor cores asynchronously from shared memory.

The test asks for --few, which is a third of them: no float16, whose code is that of bfloat16, and
every two options together, but not every three.

    python benches/compile_kernels.py            # with the Triton that is installed
    PYTHONPATH=other-triton python benches/compile_kernels.py > benches/results/compile-X.txt
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from corda_kernels.kernels import triton_syrk
from corda_kernels.kernels.shares import Shares
from corda_kernels.kernels.triton_syrk import (
    POINTER,
    POINTER_FLOAT32,
    POINTER_UNALIGNED,
    TMA,
    TMA_TURNED,
    TMA_WIDE,
    Tile,
)

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


@dataclass(frozen=True)
class Case:
    """One kernel, for one architecture."""

    capability: int
    dtype: str
    tile: Tile
    tma: bool
    product: str = "ieee"
    statistics: bool = True
    atomic: bool = True
    ragged: bool = False
    aligned: bool = True
    runs: int = 0

    @property
    def few(self) -> bool:
        """Whether it is among a few cases that hold every two options together.

        Registers are scarcest with statistics and with ragged shapes, so that both are on together.
        """
        if self.dtype == "fp16":
            return False  # whose code is that of bfloat16
        if self.tma:
            twice = self.capability == 90, self.tile == TMA_WIDE, self.statistics
            return bool(self.runs) or self.tile == TMA_TURNED or sum(twice) % 2 == 1
        if self.dtype == "bf16":
            return not self.aligned or sum((self.statistics, self.atomic, self.ragged)) % 2 == 1
        options = (self.capability == 90, self.product == "bf16x3", self.statistics, self.ragged)
        return sum(options) % 2 == 0

    def __str__(self) -> str:
        kind = "tma" if self.tma else "pointer"
        flags = [
            name for name in ("statistics", "atomic", "ragged", "aligned") if getattr(self, name)
        ]
        flags += [f"runs {self.runs}"] if self.runs else []
        sizes = "x".join(map(str, self.tile))
        return f"sm_{self.capability} {self.dtype} {kind} {sizes} {self.product} {'+'.join(flags)}"


def cases() -> list[Case]:
    """Every configuration that a launch or `benches/syrk_experiment.py` can choose."""
    found = []
    for dtype in ("bf16", "fp16"):
        for statistics in (True, False):
            found += [
                Case(capability, dtype, tile, tma=True, statistics=statistics)
                for capability in (90, 100)
                for tile in (TMA_WIDE, TMA)
            ]
            found += [
                Case(90, dtype, tile, True, statistics=statistics, runs=runs)
                for tile, runs in ((TMA_TURNED, 0), (TMA_TURNED, 2), (TMA_WIDE, 2))
                if statistics or not runs
            ]
            found += [
                Case(80, dtype, POINTER, False, "ieee", statistics, atomic, ragged)
                for atomic in (True, False)
                for ragged in (True, False)
            ]
        found += [
            Case(capability, dtype, POINTER_UNALIGNED, False, ragged=True, aligned=False)
            for capability in (80, 90, 100)
        ]
    found += [
        Case(
            capability,
            "fp32",
            POINTER_FLOAT32,
            False,
            product,
            statistics,
            True,
            ragged,
            not ragged,
        )
        for capability in (80, 90, 100)
        for product in ("bf16x3", "tf32x3")
        for statistics in (True, False)
        for ragged in (True, False)
    ]
    return found


def traps() -> list[Case]:
    """Configurations that are known to be bad: the checks must find each of them wrong."""
    return [
        Case(80, "bf16", POINTER._replace(warps=4), False, atomic=False),
        Case(80, "bf16", POINTER, False, ragged=True, aligned=False),
        Case(90, "bf16", TMA_WIDE._replace(stages=8), tma=True),
        Case(90, "bf16", TMA_WIDE._replace(warps=4), tma=True),
    ]


@dataclass(frozen=True)
class Code:
    """What the compiler made of a case."""

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return len(re.findall(pattern, self.sass))


def compile_case(case: Case) -> Code:
    """Compiles with the Triton that is imported, and disassembles."""
    tile = case.tile
    constants: dict[str, Any] = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    constants |= {"GROUP": triton_syrk._group(4096), "STATISTICS": case.statistics}
    if case.tma:
        kernel = triton_syrk._tiles_by_tma
        constants |= {"DTYPE": _TYPES[case.dtype], "RUNS": case.runs}
        signature = {
            "a_desc": f"tensordesc<{case.dtype}[{tile.BK},{tile.BM}]>",
            "b_desc": f"tensordesc<{case.dtype}[{tile.BK},{tile.BN}]>",
            "c_desc": f"tensordesc<fp32[{tile.BM},{tile.BN}]>",
        }
        aligned = ["chain", "part"]
    else:
        kernel = triton_syrk._tiles_by_pointer
        constants |= {"PRECISION": case.product, "ATOMIC": case.atomic, "RAGGED": case.ragged}
        signature = {"x_ptr": f"*{case.dtype}", "c_ptr": "*fp32"}
        aligned = ["c_ptr", "chain", "part"]
        aligned += ["x_ptr", "stride", "c_stride", "d"] if case.aligned else []
    signature |= {"absmax_ptr": "*fp32", "count_ptr": "*i64", "n": "i32", "d": "i32"}
    if not case.tma:
        signature |= {"stride": "i32", "c_stride": "i32"}
    signature |= dict.fromkeys(Shares._fields, "i32")
    signature |= {"alpha": "fp32", "threshold": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", case.capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return Code(registers, stack, compiled.metadata.shared, sass)


def faults(case: Case, code: Code) -> list[str]:
    """What is wrong with the code; an empty list if nothing is."""
    found = []
    if code.stack or code.count(r"\b(?:LDL|STL)\b"):
        found.append(f"spills ({code.stack} B of stack)")
    if code.shared > _SHARED_LIMIT[case.capability]:
        found.append(f"{code.shared} B of shared memory")
    if case.capability == 90 and case.tma:
        operands = re.findall(r"HGMMA[^;]*", code.sass)
        if not operands:
            found.append("no HGMMA")
        # Both operands as descriptors of shared memory, transposed there.
        elif any("tnspA" not in text or "tnspB" not in text for text in operands):
            found.append("an HGMMA operand comes from registers")
        if _serialised(code.sass):
            found.append("every HGMMA is waited for")
    return found


def _serialised(sass: str) -> bool:
    """Whether the products of a step run one by one, each waited for before the next starts.

    ptxas does so (warning C7515) when it cannot prove that their registers are left alone.
    """
    products = len(re.findall(r"\bHGMMA", sass))
    waits = len(re.findall(r"WARPGROUP\.DEPBAR", sass))
    return waits >= products


def _run(tool: str, *arguments: str) -> str:
    command = [str(_BINARIES / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Prints all cases; 1 if one has a fault, or a trap has none."""
    print(f"Triton {triton.__version__}")
    failed = 0
    few = "--few" in sys.argv[1:]
    for case in cases():
        if few and not case.few:
            continue
        code = compile_case(case)
        wrong = faults(case, code)
        failed += bool(wrong)
        print(
            f"{case!s:<70} {code.registers:>4} registers {code.shared:>7} B shared  "
            f"{'; '.join(wrong) or 'ok'}",
            flush=True,
        )
    for case in traps():
        found = faults(case, compile_case(case))
        failed += not found
        print(f"trap {case!s:<70} {'; '.join(found) or 'NOT NOTICED'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
