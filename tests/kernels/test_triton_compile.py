"""Machine code of the Triton kernels, compiled ahead of time: needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benches" / "compile_kernels.py"


def test_configurations_compile_without_spills_and_every_trap_is_noticed() -> None:
    # In a process of its own: here the kernels are defined for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--few"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == 27
    assert done.stdout.count("\ntrap ") == 4
