from __future__ import annotations

import pytest
import torch

from corda_kernels.precision import without_autocast


def test_autocast_ends_on_the_kind_of_device_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    torch.set_autocast_enabled("xpu", True)
    try:
        with without_autocast():
            assert not torch.is_autocast_enabled("xpu")
        assert torch.is_autocast_enabled("xpu")
    finally:
        torch.set_autocast_enabled("xpu", False)
