from __future__ import annotations

import re
import sys

import chebyshev
import pytest
import torch


@torch.no_grad()
def test_both_iterations_are_right_at_both_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "200", "8"])
    chebyshev.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    for line in lines:
        assert float(re.search(r"error (\S+)$", line)[1]) < 1e-4
        assert "  0 in float64" not in line
