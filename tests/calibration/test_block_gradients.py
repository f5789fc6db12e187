"""Gradients block by block are those of one pass, whose sums are of one block at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from torch import Tensor, nn

from corda_kernels import CovarianceSet, calibrate, calibrate_blocks
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration import kept_text as kept_text_module
from corda_kernels.calibration import run as run_module
from corda_kernels.calibration.blocks import calibrate_block_parts
from corda_kernels.calibration.covariance import Gradient
from corda_kernels.errors import CalibrationError, OutOfMemoryWarning

pytestmark = pytest.mark.slow

BOTH: dict[str, Any] = {"sides": "both", "progress": False}


def batches() -> list[Any]:
    """Sequences of two lengths, padding, masked labels, and tokens that do not count."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 64, (3, 9), generator=generator) for _ in range(4)]
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    labels = ids[2].masked_fill(torch.arange(9) < 5, -100)
    return [
        ids[0],
        {"input_ids": ids[1], "attention_mask": mask},
        {"input_ids": ids[2], "labels": labels},
        {"input_ids": ids[3], "token_mask": ids[3] % 3 > 0},
    ]


def same(found: CovarianceSet, whole: CovarianceSet, tolerance: float = 1e-6) -> None:
    assert found.gradients.keys() == found.keys()
    assert found.provenance == whole.provenance
    for name, gradient in found.gradients.items():
        expected = whole.gradients[name]
        pairs = [
            (found[name].matrix, whole[name].matrix),
            *zip(gradient.tensors, expected.tensors, strict=True),
        ]
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            assert float((ours - theirs).norm() / theirs.norm()) < tolerance, name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("labels", ["given", "sampled"])
def test_blocks_give_the_gradients_of_one_pass(
    tiny_model: Make, architecture: str, labels: Any
) -> None:
    model = tiny_model(architecture, initializer_range=0.1).double()
    whole = calibrate(model, batches(), labels=labels, **BOTH)
    blocks = list(calibrate_blocks(model, batches(), labels=labels, **BOTH))
    assert len(blocks) == 2
    assert [name for block in reversed(blocks) for name in block] == list(whole)
    for block in blocks:
        same(block, whole)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_sums_in_memory_are_those_of_one_block(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    made: list[weakref.ref[Gradient]] = []
    original, most = Gradient.__post_init__, 0

    def noted(self: Gradient) -> None:
        nonlocal most
        original(self)
        made.append(weakref.ref(self))
        alive = [each() for each in made]
        most = max(most, len({each.matrix.data_ptr() for each in alive if each is not None}))

    monkeypatch.setattr(Gradient, "__post_init__", noted)
    ran = 0
    for block in calibrate_blocks(model, batches(), **BOTH):
        ran += len(block)
        del block
    assert ran == 4 * most == 28


def test_offloaded_weights_are_fetched_for_either_way(tiny_model: Make) -> None:
    from accelerate import cpu_offload

    model = tiny_model("llama", initializer_range=0.1).double()
    whole = calibrate(model, batches(), **BOTH)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    for block in calibrate_blocks(model, batches(), **BOTH):
        same(block, whole)
    assert all(p.requires_grad and p.is_meta for p in model.model.layers.parameters())


def test_parts_and_some_targets(tiny_model: Make) -> None:
    model = tiny_model("gpt2", num_hidden_layers=3, initializer_range=0.1)
    options: dict[str, Any] = {"targets": ["transformer.h.1.mlp.c_fc"], **BOTH}
    ((first, second),) = calibrate_block_parts(model, batches(), parts=2, **options)
    for part, found in enumerate((first, second)):
        same(found, calibrate(model, batches()[part::2], **options), 1e-5)


class Killed(BaseException):
    """What a kill looks like from inside: nothing catches it."""


@pytest.mark.parametrize("parts", [1, 2])
def test_a_resumed_run_gives_the_same_bits(tiny_model: Make, tmp_path: Path, parts: int) -> None:
    model = tiny_model("llama", num_hidden_layers=3, initializer_range=0.1)
    options: dict[str, Any] = {"labels": "sampled", "parts": parts, **BOTH}
    expected = list(calibrate_block_parts(model, batches(), **options))

    def run(resume: bool) -> Any:
        kept = CalibrationCheckpoint(tmp_path / "run", every=1, resume=resume)
        return calibrate_block_parts(model, batches(), checkpoint=kept, **options)

    started = run(False)
    for _ in range(2):
        next(started)
    del started
    found = list(run(True))
    assert len(found) == 3
    for block, other in zip(found, expected, strict=True):
        for ours, theirs in zip(block, other, strict=True):
            for name, gradient in theirs.gradients.items():
                assert all(map(torch.equal, ours.gradients[name].tensors, gradient.tensors))


def test_out_of_memory_on_the_way_back_starts_the_block_again(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kept_text_module, run_module):  # takes the CPU for a device
        monkeypatch.setattr(module, "has_own_memory", lambda device: True)
    model = tiny_model("llama", initializer_range=0.1).double()
    whole = calibrate(model, batches(), **BOTH)

    def run_out(_: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].mlp.register_forward_pre_hook(run_out)
    with pytest.warns(OutOfMemoryWarning, match="starting block 0 again with at most 1 seq"):
        blocks = list(calibrate_blocks(model, batches(), **BOTH))
    for block in blocks:
        same(block, whole, 1e-10)


def test_a_text_without_a_loss_is_refused(tiny_model: Make) -> None:
    ids = torch.randint(3, 64, (2, 9))
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    with pytest.raises(CalibrationError, match="no token has a loss"):
        list(calibrate_blocks(tiny_model("llama"), [batch], **BOTH))
