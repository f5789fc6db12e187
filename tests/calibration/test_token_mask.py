"""Tokens that the model reads and the sums leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from raw_inputs import check, inputs_read, pad, random_ids
from torch import Tensor, nn

from corda_kernels import CovarianceSet, calibrate, calibrate_blocks
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration.batches import token_count, unpadded
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import BatchError, CalibrationError, CheckpointError


def masked_batches() -> tuple[list[dict[str, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Batches, padded and not, and their sequences (length,) with the tokens of each that count."""
    torch.manual_seed(2)
    sequences = [random_ids(length) for length in (9, 4, 9, 7, 7)]
    counted = [torch.rand(len(ids)) < 0.5 for ids in sequences]
    counted[2][:] = False  # of a whole sequence nothing counts
    counted[4][-1] = True
    padded = pad(sequences[:3], "left")
    mask = torch.ones_like(padded["input_ids"])  # what it says of padding does not matter
    for row, each in zip(mask, counted[:3], strict=True):
        row[len(row) - len(each) :] = each
    whole = {"input_ids": torch.stack(sequences[3:]), "token_mask": torch.stack(counted[3:])}
    return [padded | {"token_mask": mask}, whole], list(zip(sequences, counted, strict=True))


def one_pass(model: nn.Module, batches: list[Any], _: Path) -> CovarianceSet:
    return calibrate(model, batches, progress=False)


def by_block(model: nn.Module, batches: list[Any], _: Path) -> CovarianceSet:
    parts = [dict(part) for part in calibrate_blocks(model, batches, progress=False)]
    return CovarianceSet({name: each for part in parts for name, each in part.items()})


def resumed(model: nn.Module, batches: list[Any], folder: Path) -> CovarianceSet:
    first = CalibrationCheckpoint(folder / "run", every=1)
    calibrate(model, batches[:1], checkpoint=first, progress=False)
    again = CalibrationCheckpoint(folder / "run", every=1, resume=True)
    return calibrate(model, batches, checkpoint=again, progress=False)


def short_of_memory(model: nn.Module, batches: list[Any], _: Path) -> CovarianceSet:
    run = CalibrationRun(model, progress=False)
    run.max_rows = 1
    with run.capture(run.linears) as capture:
        for index, batch in enumerate(batches):
            for inputs, _ in run.together(run.forward.pieces(batch, index, (0, 0))):
                capture.begin_rows(inputs.pop("token_mask", None))
                run.forward(inputs)
    return run.result(capture, sum(map(token_count, batches)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("way", [one_pass, by_block, resumed, short_of_memory])
def test_sums_are_of_the_tokens_that_count_in_their_context(
    tiny_model: Make, tmp_path: Path, architecture: str, way: Callable[..., CovarianceSet]
) -> None:
    model = tiny_model(architecture)
    batches, sequences = masked_batches()
    read = inputs_read(model, [ids[None] for ids, _ in sequences])
    counted = torch.cat([mask for _, mask in sequences])
    expected = {name: [torch.cat(inputs)[counted]] for name, inputs in read.items()}
    check(way(model, batches, tmp_path), expected, tolerance=1e-5)
    assert sum(map(token_count, batches)) == int(counted.sum())


def test_another_mask_is_another_text_to_a_checkpoint(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model("llama")
    batches, _ = masked_batches()
    first = CalibrationCheckpoint(tmp_path / "run", every=1)
    calibrate(model, batches[:1], checkpoint=first, progress=False)
    batches[0] = batches[0] | {"token_mask": batches[0]["token_mask"].flip(1)}
    again = CalibrationCheckpoint(tmp_path / "run", every=1, resume=True)
    with pytest.raises(CheckpointError, match="data"):
        calibrate(model, batches, checkpoint=again, progress=False)


def test_a_layer_that_one_length_alone_calls_keeps_the_mask_of_its_tokens() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 6)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            return self.first(x) + (self.second(x) if input_ids.shape[1] % 2 == 0 else 0)

    torch.manual_seed(0)
    model = Skipping()
    # One batch, whose lengths run one after the other: 4, 5 and 8 tokens.
    rows = [(random_ids(length), torch.rand(length) < 0.5) for length in (5, 4, 8)]
    batch = pad([ids for ids, _ in rows], "right")
    batch["token_mask"] = pad([mask.long() for _, mask in rows], "right")["input_ids"] == 1
    found = calibrate(model, [batch], progress=False)
    odd, *even = [model.embedding(ids)[mask].detach().double() for ids, mask in rows]
    for name, x in (("first", torch.cat([odd, *even])), ("second", torch.cat(even))):
        torch.testing.assert_close(
            found[name].matrix.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.full((2, 3), 0.5), [[1, 1, 1]] * 2])
def test_another_mask_is_refused_by_the_batch_number(mask: Any) -> None:
    batch = {"input_ids": torch.ones(2, 3).long(), "token_mask": mask}
    with pytest.raises(BatchError, match=r"batch 7 .* token_mask (.* \(2, 3\)|other values)"):
        list(unpadded(batch, 7))


def test_nothing_counts(tiny_model: Make) -> None:
    batch = {"input_ids": random_ids(2, 4), "token_mask": torch.zeros(2, 4)}
    with pytest.raises(CalibrationError, match="no tokens to calibrate on"):
        calibrate(tiny_model("llama"), [batch], progress=False)


def test_rows_that_a_router_has_chosen_are_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.expert = nn.Embedding(64, 6), nn.Linear(6, 6)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.expert(self.embedding(input_ids)[:, ::2])

    batch = {"input_ids": random_ids(1, 4), "token_mask": torch.tensor([[1, 1, 0, 0]])}
    with pytest.raises(CalibrationError, match="layer expert received 2 rows"):
        calibrate(Routed(), [batch], progress=False)
