"""Folders of trained adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from kinds import Calibrated, Make

from corda_kernels import save_adapter


@pytest.fixture
def folder(calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path) -> Path:
    """The folder of a trained adapter."""
    save_adapter(train(adapt(calibrated(), use_peft=False)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def published(calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path) -> Path:
    """The folder of a trained adapter with residual="weight"."""
    model = adapt(calibrated(), use_peft=False, residual="weight")
    save_adapter(train(model), tmp_path / "published")
    return tmp_path / "published"
