"""The adapter under FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fsdp_script import step
from peft import PeftModel
from ranks import run_ranks
from torch import Tensor, nn

from corda_kernels import CovarianceSet, save_adapter

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("fsdp_script.py")


def test_two_ranks_of_fsdp2_train_and_save_what_one_process_does(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
    adapt: Callable[..., nn.Module],
    logits: Callable[[nn.Module], Tensor],
    tmp_path: Path,
) -> None:
    base, covariances = calibrated()
    base.save_pretrained(tmp_path / "base")
    model = adapt((copy.deepcopy(base), covariances), mode="kpm")
    start = logits(model)
    save_adapter(model, tmp_path / "adapter")
    ended = run_ranks(2, SCRIPT, *(tmp_path / name for name in ("base", "adapter", "trained")))
    assert ended.returncode == 0, ended.stderr
    step(model)
    expected = logits(model)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "trained"))
    assert not torch.allclose(expected, start, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
