from __future__ import annotations

import pytest
from ranks import run_ranks
from render import ROOT

pytestmark = pytest.mark.slow


def test_the_suites_run_on_tiny_sizes() -> None:
    """Every case once, untimed: what is timed in earnest takes minutes."""
    options = ["-q", "-p", "no:cacheprovider", "-n", 0, "--tiny", "--benchmark-disable"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is loaded already
    ran = run_ranks(1, "-m", "pytest", ROOT / "benches", *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "failed" not in ran.stdout
