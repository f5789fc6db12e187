from __future__ import annotations

import os
import subprocess
import sys

import pytest
from render import ROOT

pytestmark = pytest.mark.slow


def test_the_suites_run_on_tiny_sizes() -> None:
    """Every case once, untimed: what is timed in earnest takes minutes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benches", "--tiny"]
    ran = subprocess.run(
        [*command, "-n", "0", "--benchmark-disable"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "failed" not in ran.stdout
