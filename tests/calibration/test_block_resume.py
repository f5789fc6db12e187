from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from torch import Tensor, nn

from corda_kernels import CovarianceSet, calibrate_blocks
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration import capture as capture_module
from corda_kernels.calibration.blocks import calibrate_block_parts
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import CheckpointError, CordaWarning
from corda_kernels.init import CalibrationPlan, covariance_stages, united_provenance

pytestmark = pytest.mark.slow

BLOCKS = 3


class Killed(BaseException):
    """What a kill looks like from inside: nothing catches it."""


@pytest.fixture
def model(tiny_model: Make) -> nn.Module:
    return tiny_model("llama", num_hidden_layers=BLOCKS, initializer_range=0.2)


def random_batches(count: int = 4) -> list[Tensor]:
    return [torch.randint(3, 64, (2, 5 + index)) for index in range(count)]


def checkpoint(folder: Path, **options: Any) -> CalibrationCheckpoint:
    return CalibrationCheckpoint(folder / "run", **({"every": 1, "resume": True} | options))


def run(model: nn.Module, batches: Any, **options: Any) -> list[list[CovarianceSet]]:
    options = {"parts": 1, "outlier_threshold": 1.0, "progress": False} | options
    return list(calibrate_block_parts(model, batches, **options))


def contents(blocks: list[list[CovarianceSet]], folder: Path) -> list[bytes]:
    """The files of all sets."""
    saved = []
    for block in blocks:
        for covariances in block:
            covariances.save(folder / "saved")
            saved.append((folder / "saved").read_bytes())
    (folder / "saved").unlink()
    return saved


def interrupted(model: nn.Module, batches: list[Tensor], block: int, **options: Any) -> None:
    """Runs until a block is in the middle of the text, and dies."""
    reads = 0

    def die(*_: Any) -> None:
        nonlocal reads
        reads += 1
        if reads > len(batches) // 2 + (block == 0):  # the first block is tried before all
            raise Killed

    handle = model.model.layers[block].mlp.register_forward_pre_hook(die)
    try:
        with pytest.raises(Killed):
            run(model, batches, **options)
    finally:
        handle.remove()


@pytest.mark.parametrize(("block", "parts"), [(0, 2), (1, 1), (2, 2)])
def test_a_resumed_run_gives_the_same_blocks_wherever_it_was_killed(
    model: nn.Module, tmp_path: Path, block: int, parts: int
) -> None:
    batches = random_batches()
    expected = contents(run(model, batches, parts=parts), tmp_path)
    interrupted(model, batches, block, parts=parts, checkpoint=checkpoint(tmp_path))
    kept = [f"run-block-{index}" for index in range(block)]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept
    found = run(model, batches, parts=parts, checkpoint=checkpoint(tmp_path))
    assert contents(found, tmp_path) == expected
    checkpoint(tmp_path).discard()
    assert not list(tmp_path.iterdir())


def test_a_run_can_be_killed_again_and_again(model: nn.Module, tmp_path: Path) -> None:
    batches = random_batches()
    for block in range(BLOCKS):
        interrupted(model, batches, block, checkpoint=checkpoint(tmp_path))
    found = run(model, batches, checkpoint=checkpoint(tmp_path))
    assert contents(found, tmp_path) == contents(run(model, batches), tmp_path)


def test_finished_blocks_run_without_products_and_the_last_not_at_all(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = random_batches()
    expected = contents(run(model, batches, checkpoint=checkpoint(tmp_path)), tmp_path)
    (tmp_path / "run-block-2").unlink()
    products, ran = [], [0] * BLOCKS
    syrk_ = capture_module.syrk_
    monkeypatch.setattr(
        capture_module, "syrk_", lambda *a, **o: products.append(1) or syrk_(*a, **o)
    )
    for index, block in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            ran[index] += 1

        block.mlp.register_forward_pre_hook(count)
    assert contents(run(model, batches, checkpoint=checkpoint(tmp_path)), tmp_path) == expected
    assert len(products) == 4 * len(batches)  # one block's inputs
    assert ran == [1 + 4, 4, 4]  # the first block is tried before all

    products.clear()
    ran[:] = [0] * BLOCKS
    assert contents(run(model, batches, checkpoint=checkpoint(tmp_path)), tmp_path) == expected
    assert (products, ran) == ([], [1 + 4, 4, 0])


def test_blocks_without_targets_have_no_file(model: nn.Module, tmp_path: Path) -> None:
    batches, targets = random_batches(), r".*\.[02]\..*q_proj"
    expected = contents(run(model, batches, targets=targets), tmp_path)
    interrupted(model, batches, 2, targets=targets, checkpoint=checkpoint(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["run-block-0"]
    found = run(model, batches, targets=targets, checkpoint=checkpoint(tmp_path))
    assert contents(found, tmp_path) == expected


OTHER: dict[str, Callable[[nn.Module, list[Tensor], dict[str, Any]], None]] = {
    "weights": lambda model, batches, options: model.model.norm.weight.data.add_(1),
    "targets": lambda model, batches, options: options.update(targets=["q_proj"]),
    "outlier_threshold": lambda model, batches, options: options.update(outlier_threshold=2.0),
    "normalize": lambda model, batches, options: options.update(normalize="peft"),
    "stability": lambda model, batches, options: options.update(parts=2),
    "data": lambda model, batches, options: batches[-1].add_(1),
}


@pytest.mark.parametrize("what", OTHER)
def test_the_checkpoint_of_another_run_is_refused_by_what_differs(
    model: nn.Module, tmp_path: Path, what: str
) -> None:
    batches = random_batches()
    interrupted(model, batches, 1, checkpoint=checkpoint(tmp_path))
    options: dict[str, Any] = {}
    OTHER[what](model, batches, options)
    with pytest.raises(
        CheckpointError, match=rf"block-0 is the .* another run.* differs in {what}"
    ):
        run(model, batches, checkpoint=checkpoint(tmp_path), **options)


def test_a_damaged_block_is_refused(model: nn.Module, tmp_path: Path) -> None:
    batches = random_batches()
    interrupted(model, batches, 2, checkpoint=checkpoint(tmp_path))
    file = tmp_path / "run-block-1"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 4
    for damaged, reason in ((whole[:-1], "truncated"), (bytes(flipped), "altered or damaged")):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{file}.*{reason}"):
            run(model, batches, checkpoint=checkpoint(tmp_path))
    file.write_bytes((tmp_path / "run-block-0").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds sums that do not fit layer model\.layers\.0"):
        run(model, batches, checkpoint=checkpoint(tmp_path))


def test_a_full_disk_warns_and_loses_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = random_batches()
    expected = contents(run(model, batches), tmp_path)
    interrupted(model, batches, 1, checkpoint=checkpoint(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    blocks = calibrate_blocks(
        model, batches, outlier_threshold=1.0, checkpoint=checkpoint(tmp_path), progress=False
    )
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.warns(CordaWarning) as caught:
            found = [[block] for block in blocks]
    assert "No space left on device" in str(caught[0].message)
    assert len(caught) == BLOCKS - 1
    assert contents(found, tmp_path) == expected


def test_by_default_a_short_text_keeps_nothing(model: nn.Module, tmp_path: Path) -> None:
    run(model, random_batches(), checkpoint=checkpoint(tmp_path, every=None))
    run(model, random_batches(), checkpoint=checkpoint(tmp_path, every=53))  # of 52 tokens
    assert not list(tmp_path.iterdir())


def stages(model: nn.Module, batches: Any, folder: Path, *, blocks: bool) -> dict[str, Any]:
    """What the command line makes a file of: all layers, and the notes."""
    limit = 3 * covariance_bytes(model)[1]  # both halves of one block, and their mean
    plan = CalibrationPlan(
        rank=4,
        stability=True,
        memory_limit=limit if blocks else None,
        progress=False,
    )
    sets = list(covariance_stages(model, batches, plan, checkpoint=checkpoint(folder)))
    layers = {name: covariance for stage in sets for name, covariance in stage.items()}
    return {"layers": layers, "notes": united_provenance([stage.provenance for stage in sets])}


def test_stages_are_resumed_with_their_stability(model: nn.Module, tmp_path: Path) -> None:
    batches = random_batches()
    (tmp_path / "whole").mkdir()
    expected = stages(model, batches, tmp_path / "whole", blocks=True)
    interrupted(model, batches, 1, parts=2, outlier_threshold=6.0, checkpoint=checkpoint(tmp_path))
    found = stages(model, batches, tmp_path, blocks=True)
    assert found["notes"] == expected["notes"]
    assert list(found["layers"]) == list(expected["layers"])
    for name, covariance in found["layers"].items():
        assert torch.equal(covariance.matrix, expected["layers"][name].matrix)


def test_one_pass_and_blocks_do_not_go_on_from_each_other(model: nn.Module, tmp_path: Path) -> None:
    batches = random_batches()
    interrupted(model, batches, 1, parts=2, checkpoint=checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=r"block-0 .* differs in memory_limit"):
        stages(model, batches, tmp_path, blocks=False)
    checkpoint(tmp_path).discard()
    (tmp_path / "run-1").touch()
    with pytest.raises(CheckpointError, match=r"run-1 .* differs in memory_limit"):
        stages(model, batches, tmp_path, blocks=True)


def test_files_are_those_of_their_rank(tmp_path: Path) -> None:
    mine = checkpoint(tmp_path).block(3).of_rank(Ranks(1, 2))
    assert Path(mine.path).name == "run-block-3-rank-1-of-2"
    Path(mine.path).touch()
    assert checkpoint(tmp_path).kept() == [Path(mine.path)]
    for ranks in (Ranks(), Ranks(0, 3)):
        with pytest.raises(CheckpointError, match=r"rank-1-of-2 .* differs in ranks"):
            checkpoint(tmp_path).of_rank(ranks)
    checkpoint(tmp_path).of_rank(Ranks(0, 2))
    checkpoint(tmp_path).discard()
    assert not list(tmp_path.iterdir())
