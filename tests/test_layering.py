"""What a file of the package may import; the contracts stand in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

CONFIG = Path(__file__).parents[1] / "pyproject.toml"


def test_imports_point_down(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(CONFIG), no_cache=True)
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "3 kept, 0 broken" in shown
