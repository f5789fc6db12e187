"""What was loaded from a file does not change, nor end the process, when the file does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels import CovarianceSet, load_for_training, save_adapter
from corda_kernels.adapter import read_adapter


def overwrite(folder: Path) -> None:
    """Replaces every tensor file in place by other bytes, then cuts it short, as cp does."""
    for file in folder.rglob("*.safetensors"):
        size = file.stat().st_size
        with open(file, "r+b") as opened:
            opened.write(b"\x55" * size)
        with open(file, "r+b") as opened:
            opened.truncate(1)


@pytest.mark.filterwarnings("ignore:Could not find a config file in residual of:UserWarning")
@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("residual", [None, "weight"])
def test_a_running_model_keeps_its_adapter(
    calibrated: Callable[..., tuple[nn.Module, Any]],
    adapt: Callable[..., nn.Module],
    train: Callable[..., nn.Module],
    logits: Callable[[nn.Module], Tensor],
    tmp_path: Path,
    use_peft: bool,
    residual: str | None,
) -> None:
    save_adapter(train(adapt(calibrated(), residual=residual)), tmp_path)
    model = load_for_training(calibrated()[0], tmp_path, use_peft=use_peft)
    adapter = read_adapter(tmp_path)
    expected = logits(model)
    factors = {name: (layer.A.clone(), layer.B.clone()) for name, layer in adapter.layers.items()}
    overwrite(tmp_path)
    assert torch.equal(logits(model), expected)
    for name, (A, B) in factors.items():
        assert torch.equal(adapter.layers[name].A, A)
        assert torch.equal(adapter.layers[name].B, B)


def test_loaded_covariances_keep_their_numbers(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]], tmp_path: Path
) -> None:
    expected = calibrated()[1]
    expected.save(tmp_path / "covariances.safetensors")
    found = CovarianceSet.load(tmp_path / "covariances.safetensors")
    overwrite(tmp_path)
    for name, covariance in expected.items():
        for part in ("matrix", "absmax", "outlier_count"):
            assert torch.equal(getattr(found[name], part), getattr(covariance, part)), (name, part)
