"""A block that runs out of memory starts again with smaller batches, then sums on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_runs import FIXED, random_batches, stream
from kinds import Make
from torch import Tensor, nn

from corda_kernels import calibrate
from corda_kernels.calibration import kept_text as kept_text_module
from corda_kernels.calibration import run as run_module
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.kept_text import KeptText, alike
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import (
    CalibrationError,
    OutOfMemoryWarning,
)
from corda_kernels.memory import has_own_memory
from corda_kernels.structure import decoder_blocks


@pytest.fixture(scope="module")
def make(tiny_model: Make) -> Make:
    return lambda kind: tiny_model(kind, initializer_range=0.2, **FIXED[kind])


class Cramped:
    """Lets a block run out of memory, half of it done, with more than so many sequences."""

    def __init__(self, block: nn.Module, rows: int) -> None:
        self.rows = rows
        self.ran: list[int] = []
        block.mlp.down_proj.register_forward_pre_hook(self.run_out)

    def run_out(self, _: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.ran.append(len(args[0]))


def _with_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the CPU for a device."""
    for module in (kept_text_module, run_module):
        monkeypatch.setattr(module, "has_own_memory", lambda device: True)


@pytest.mark.parametrize(("architecture", "parts"), [("llama", 2), ("gemma2", 1)])
def test_out_of_memory_starts_the_block_again_with_smaller_batches(
    make: Make, monkeypatch: pytest.MonkeyPatch, architecture: str, parts: int
) -> None:
    _with_memory_of_its_own(monkeypatch)
    monkeypatch.setattr(run_module, "_TOGETHER", {True: 0})  # blocks run batch by batch
    model = make(architecture)
    # It runs out when a sequence has gone through the block already.
    batches = [torch.randint(3, 64, (1, 7)), *random_batches(), torch.randint(3, 64, (5, 12))]
    expected = [calibrate(model, batches[part::parts], progress=False) for part in range(parts)]
    cramped = Cramped(model.model.layers[1], rows=1)
    with pytest.warns(OutOfMemoryWarning) as caught:
        found = stream(model, batches, parts=parts, outlier_threshold=6.0)
    assert [str(warning.message) for warning in caught] == [
        "memory ran out while calibrating: starting block 1 again with at most "
        f"{rows} sequence(s) at a time"
        for rows in (2, 1)
    ]
    rows = sum(len(batch["input_ids"] if isinstance(batch, dict) else batch) for batch in batches)
    assert cramped.ran[-rows:] == [1] * rows
    for index, block in enumerate(found):
        for covariances, whole in zip(block, expected, strict=True):
            for name, covariance in covariances.items():
                error = covariance.matrix - whole[name].matrix
                assert error.norm() < 1e-5 * whole[name].matrix.norm(), name
                assert covariance.tokens == whole[name].tokens
                assert (covariance.calls > whole[name].calls) == (index > 0)
            assert [n for _, n in covariances.groups()] == [
                n for _, n in whole.groups() if n[0] in covariances
            ]


@pytest.mark.parametrize("parts", [1, 2])
def test_sums_that_a_device_has_no_memory_for_are_made_on_the_host(
    make: Make, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    _with_memory_of_its_own(monkeypatch)
    model, batches = make("llama"), [torch.randint(3, 64, (2, 12)) for _ in range(4)]
    expected = [calibrate(model, batches[part::parts], progress=False) for part in range(parts)]
    where: list[bool] = []

    def cramped(capture: InputCapture, name: str, x: Tensor, kept: Any) -> None:
        if name.startswith("model.layers.1"):
            where.append(capture.on_host)
            if not capture.on_host:
                raise torch.OutOfMemoryError("CUDA out of memory")
        found(capture, name, x, kept)

    found = InputCapture._join_or_found
    monkeypatch.setattr(InputCapture, "_join_or_found", cramped)
    with pytest.warns(OutOfMemoryWarning) as caught:
        blocks = stream(model, batches, parts=parts, outlier_threshold=6.0)
    ends = [str(warning.message).partition(" again with ")[2] for warning in caught]
    assert ends == [
        "at most 1 sequence(s) at a time",
        "covariances that the CPU sums up, which takes longer",
    ]
    assert where[:3] == [False, False, True]
    assert all(where[2:])
    for block in blocks:
        for covariances, whole in zip(block, expected, strict=True):
            for name, covariance in covariances.items():
                error = covariance.matrix - whole[name].matrix
                assert error.norm() < 1e-5 * whole[name].matrix.norm(), name
                assert torch.equal(covariance.outlier_count, whole[name].outlier_count)


def test_regrouped_sequences_keep_their_order(make: Make) -> None:
    model, batches = make("llama"), random_batches()
    run = CalibrationRun(model, progress=False)
    blocks = list(decoder_blocks(model).values())
    text = KeptText(run, blocks, batches)
    text.record()
    text.advance(0)

    def rows() -> dict[Any, Tensor]:
        together: dict[Any, list[Tensor]] = {}
        for current in text.sequences:
            together.setdefault(alike(current), []).append(current.states[-1])
        return {key: torch.cat(hidden) for key, hidden in together.items()}

    before = rows()
    for most in (3, 2, 1):
        run.max_rows = most
        text._regroup()
        assert max(len(current.states[-1]) for current in text.sequences) == most
        assert all(torch.equal(found, before[key]) for key, found in rows().items())


def test_out_of_memory_in_the_first_look_starts_that_again(make: Make) -> None:
    model, batches = make("llama"), random_batches()
    whole = calibrate(model, batches, outlier_threshold=1.0, progress=False)

    def run_out(_: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.embed_tokens.register_forward_pre_hook(run_out)
    with pytest.warns(OutOfMemoryWarning, match="starting again with at most 2 sequence"):
        found = stream(model, batches)
    for (block,) in found:
        for name, covariance in block.items():
            error = covariance.matrix - whole[name].matrix
            assert error.norm() < 1e-5 * whole[name].matrix.norm(), name


def test_out_of_memory_for_a_single_sequence_says_what_to_do(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_memory_of_its_own(monkeypatch)
    model = make("llama")
    Cramped(model.model.layers[1], rows=0)
    with (
        pytest.warns(OutOfMemoryWarning, match="block 1 again with covariances that the CPU sums"),
        pytest.raises(CalibrationError, match=r"for a single sequence, .*--device cpu"),
    ):
        stream(model, [torch.randint(3, 64, (1, 5))])
    with pytest.raises(CalibrationError, match="a list of batches, which can be started again"):
        stream(model, iter([torch.randint(3, 64, (2, 5))]))


def test_the_host_keeps_one_set_of_hidden_states_where_it_computes_itself(
    make: Make,
) -> None:
    assert not has_own_memory(torch.device("cpu"))
    assert has_own_memory(torch.device("cuda:1"))
    model = make("llama")
    Cramped(model.model.layers[1], rows=1)
    with pytest.raises(torch.OutOfMemoryError):
        stream(model, random_batches())
