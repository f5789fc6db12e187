"""Batches that run together: the same covariances as one by one, from fewer forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from raw_inputs import Flat, check, distance, inputs_read, pad, random_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from corda_kernels import CovarianceSet, calibrate, calibrate_blocks
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration import capture as capture_module
from corda_kernels.calibration import run as run_module
from corda_kernels.calibration.batches import Piece, TextSum, together
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import (
    BatchError,
    CalibrationError,
    NonFiniteActivationError,
    OutOfMemoryWarning,
)

pytestmark = pytest.mark.slow


def run(model: nn.Module, batches: Any, **options: Any) -> CovarianceSet:
    return calibrate(model, batches, outlier_threshold=1.0, progress=False, **options)


def shapes_run(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the token ids of each forward pass from now on."""
    ran: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: ran.append(tuple(args[0].shape))
    )
    return ran


def few(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(run_module, "_TOGETHER", {True: tokens, False: tokens})


def test_equal_sequences_run_together_within_bounds() -> None:
    def piece(batch: int, rows: int, length: int, **more: Tensor) -> Piece:
        ids = torch.arange(rows * length).view(rows, length) + 100 * batch
        return Piece(batch, (0, 0), {"input_ids": ids, **more}, text=True)

    image = Piece(2, (0, 0), {"pixel_values": torch.zeros(5, 2)}, text=False)
    masked = piece(3, 1, 4, token_mask=torch.ones(1, 4))
    typed = piece(5, 1, 4, token_type_ids=torch.ones(1, 4))
    pieces = [piece(0, 2, 4), piece(0, 1, 3), piece(1, 3, 4), image, masked, piece(4, 1, 3), typed]
    found = list(together(pieces))
    assert [batches for _, batches in found] == [[0, 0, 1, 1, 1], [0, 4], [2], [3], [5]]
    assert torch.equal(
        found[0][0]["input_ids"],
        torch.cat([pieces[0].inputs["input_ids"], pieces[2].inputs["input_ids"]]),
    )
    assert found[2][0] is not image.inputs  # whoever takes something out leaves the piece whole
    halves = list(together(pieces, 2))
    assert [batches for _, batches in halves] == [[0, 0], [1, 1], [1], [0, 4], [2], [3], [5]]
    assert torch.equal(
        torch.cat([inputs["input_ids"] for inputs, _ in halves[:3]]), found[0][0]["input_ids"]
    )


def test_a_rank_runs_its_own_batches_until_another_would_be_too_many() -> None:
    calibration = CalibrationRun(Flat(), on_unseen="skip", progress=False)
    calibration.ranks = Ranks(1, 2)
    text = TextSum()
    batches = [*(random_ids(1, 4) for _ in range(9)), random_ids(1, 30)]
    windows = calibration.windows(calibration.read(batches, text), text, 12)
    ends = [([piece.batch for piece in window], len(text.counts)) for window in windows]
    assert ends == [([1, 3, 5], 6), ([7, 9], 10)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_covariances_are_those_of_single_sequences(tiny_model: Make, architecture: str) -> None:
    model = tiny_model(architecture)
    whole = [random_ids(1, length) for length in (9, 9, 6, 9, 6)]
    padded = [random_ids(length) for length in (6, 9, 3)]
    expected = inputs_read(model, [*whole, *(ids[None] for ids in padded)])
    ran = shapes_run(model)
    found = run(model, [*whole, pad(padded, "left")])
    check(found, expected, tolerance=1e-6)
    assert sorted(ran) == [(1, 3), (3, 6), (4, 9)]
    for name, covariance in found.items():
        counts = (torch.cat(expected[name]).abs() > 1).sum(0)
        assert torch.equal(covariance.outlier_count, counts)


def test_tokens_that_do_not_count_stay_out(tiny_model: Make) -> None:
    model = tiny_model("llama")
    batches = [
        {"input_ids": random_ids(1, 7), "token_mask": (torch.rand(1, 7) < 0.5).long()}
        for _ in range(3)
    ]
    batches[1]["token_mask"][0, 2] = 1
    read = inputs_read(model, [batch["input_ids"] for batch in batches])
    counted = torch.cat([batch["token_mask"][0] for batch in batches]).bool()
    ran = shapes_run(model)
    found = run(model, batches)
    rows = int(sum(batch["token_mask"].any() for batch in batches))
    assert ran == [(rows, 7)]
    check(found, {name: [torch.cat(x)[counted]] for name, x in read.items()}, tolerance=1e-6)


def test_no_more_tokens_than_the_bound_run_together(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch, 20)
    model = tiny_model("llama")
    batches = [random_ids(1, 6) for _ in range(7)]
    ran = shapes_run(model)
    run(model, batches)
    assert ran == [(3, 6), (3, 6), (1, 6)]


def test_where_calls_are_averaged_each_batch_stays_one(tiny_model: Make) -> None:
    model = tiny_model("llama")
    batches = [random_ids(2, 6) for _ in range(3)]
    ran = shapes_run(model)
    found = run(model, batches, normalize="peft")
    assert ran == [(2, 6)] * 3
    assert {covariance.calls for covariance in found.values()} == {3}


def test_on_a_device_with_memory_of_its_own_more_run_together(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    batches = [random_ids(1, 64) for _ in range(130)]
    host = [(32, 64)] * 4 + [(2, 64)]
    ran = shapes_run(model)
    run(model, batches, targets=["layers.0.self_attn.q_proj"])
    assert ran == host
    monkeypatch.setattr(run_module, "has_own_memory", lambda device: True)
    for text, sides, shapes in (
        (batches, "inputs", [(128, 64), (2, 64)]),
        (batches, "both", host),  # a backward pass needs far more
        (iter(batches), "inputs", [(1, 64)] * 130),  # which could not start again
    ):
        ran.clear()
        run(model, text, targets=["layers.0.self_attn.q_proj"], sides=sides)
        assert ran == shapes


@pytest.mark.parametrize("labels", ["given", "sampled"])
def test_gradients_are_those_of_single_batches(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    model = tiny_model("llama", initializer_range=0.1).double()
    ids = [random_ids(2, 8) for _ in range(4)]
    given = ids[2].clone()
    given[0, :5] = -100
    batches: list[Any] = [*ids[:2], {"input_ids": ids[2], "labels": given}, ids[3]]
    options: Any = {"sides": "both", "labels": labels}
    ran = shapes_run(model)
    found = run(model, batches, **options)
    assert ran == [(6, 8), (2, 8)]  # with labels and without do not mix
    few(monkeypatch, 0)
    single = run(model, batches, **options)
    assert len(ran) == 2 + 4
    for name, gradient in single.gradients.items():
        for ours, theirs in zip(found.gradients[name].tensors, gradient.tensors, strict=True):
            assert distance(ours, theirs) < 1e-9
    # One text twice: the same losses again, or other draws.
    once, twice = (run(model, ids[:1] * count, **options).gradients for count in (1, 2))
    assert all(
        (distance(twice[n].mean, once[n].mean) > 0.01) == (labels == "sampled") for n in once
    )


@pytest.mark.parametrize("experts", ["shared", "each"])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning")
def test_experts_read_what_they_read_of_single_batches(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, experts: str
) -> None:
    model = tiny_model("mixtral").double()
    batches = [
        {"input_ids": random_ids(2, 8), "token_mask": (torch.rand(2, 8) < 0.7).long()}
        for _ in range(3)
    ]
    found = run(model, batches, experts=experts)
    few(monkeypatch, 0)
    single = run(model, batches, experts=experts)
    assert list(found) == list(single)
    for name, covariance in single.items():
        assert found[name].tokens == covariance.tokens
        assert distance(found[name].matrix, covariance.matrix) < 1e-12


def test_blocks_agree(tiny_model: Make) -> None:
    model = tiny_model("llama")
    batches = [random_ids(1, 9) for _ in range(4)] + [pad([random_ids(9), random_ids(5)], "right")]
    whole = run(model, batches)
    for block in calibrate_blocks(model, batches, outlier_threshold=1.0, progress=False):
        for name, covariance in block.items():
            assert distance(covariance.matrix, whole[name].matrix.double()) < 1e-6
            assert covariance.tokens == whole[name].tokens


@pytest.mark.parametrize("broken", [0, 1, 2, 4])
def test_nan_among_batches_that_run_together_is_of_its_own_batch(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    few(monkeypatch, 36)  # batches 0 to 2, then 3 to 5, whose check comes last
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = torch.nan
    batches = [random_ids(2, 6) for _ in range(6)]
    batches[broken][1, 3] = 2
    with pytest.raises(NonFiniteActivationError) as caught:
        run(model, batches)
    error = caught.value
    assert (error.layer, error.batch) == ("model.layers.0.self_attn.q_proj", broken)
    assert error.tokens == (12 * broken, 12 * broken + 12)


def test_sums_that_are_not_finite_are_in_no_checkpoint(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few(monkeypatch, 12)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = torch.nan
    batches = [random_ids(1, 6) for _ in range(2)]
    batches[1][0, 3] = 2
    kept = CalibrationCheckpoint(tmp_path / "run", every=1)
    with pytest.raises(NonFiniteActivationError, match="in batch 1 "):
        run(model, batches, checkpoint=kept)
    assert not kept.kept()


def test_a_gradient_that_is_not_finite_is_of_its_own_batch(tiny_model: Make) -> None:
    model = tiny_model("llama", initializer_range=0.1)
    batches = [random_ids(1, 6).clamp_min(4) for _ in range(3)]
    batches[1][0, 2] = 3

    def spoil(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            odd = (seen[-1] == 3)[..., None]
            output.register_hook(lambda gradient: gradient.masked_fill(odd, torch.inf))

    seen: list[Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.layers[1].mlp.down_proj.register_forward_hook(spoil)
    with pytest.raises(BatchError, match=r"batch 1 .* gradient at layer .*q_proj NaN or Inf"):
        run(model, batches, sides="both")


class Cramped(nn.Module):
    """A model that has memory for two sequences at a time, and refuses token 63."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(64, 6), nn.Linear(6, 6)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if bool((input_ids == 63).any()):
            raise ValueError("token 63 is odd")
        return self.layer(self.embedding(input_ids))


def test_memory_that_runs_out_halves_what_runs_together() -> None:
    model = Cramped()
    batches = [random_ids(1, 4).clamp_max(62) for _ in range(9)]
    ran = shapes_run(model)
    with pytest.warns(OutOfMemoryWarning) as caught:
        found = run(model, batches)
    ends = [str(warning.message).partition("with at most ")[2] for warning in caught]
    assert ends == ["4 sequence(s) at a time", "2 sequence(s) at a time"]
    assert ran == [(2, 4)] * 4 + [(1, 4)]
    x = model.embedding(torch.cat(batches)).detach().flatten(0, 1).double()
    assert distance(found["layer"].matrix, x.T @ x / len(x)) < 1e-6


def test_a_batch_that_the_model_refuses_is_named_among_others() -> None:
    batches = [random_ids(1, 4).clamp_max(62) for _ in range(2)]
    batches[1][0, 2] = 63
    with pytest.raises(BatchError, match=r"batch 1 .*token 63 is odd") as caught:
        run(Cramped(), batches)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_malformed_batch_is_named_before_those_beside_it_run(tiny_model: Make) -> None:
    model = tiny_model("llama")
    ran = shapes_run(model)
    with pytest.raises(CalibrationError, match=r"batch 1 .* holds token 64"):
        run(model, [random_ids(1, 4), torch.tensor([[5, 64, 5, 5]]), random_ids(1, 4)])
    assert not ran


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a device."""

    names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by = args[1] if name == "index" else []
        masked = any(index is not None and index.dtype == torch.bool for index in by)
        self.count += name in self.names or masked
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"sides": "both"}, None])
def test_the_host_does_not_wait_in_each_layer_of_a_pass(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any] | None
) -> None:
    few(monkeypatch, 0)
    # The kernel of a CPU looks at values, for which nobody waits there.
    monkeypatch.setattr(capture_module, "syrk_", lambda sums, x, **_: sums.addmm_(x.mT, x))
    mask = torch.tensor([[1, 0, 1, 1, 1, 1]])
    batch = {"input_ids": random_ids(1, 6), "token_mask": mask}

    def waits(layers: int, passes: int) -> int:
        model = tiny_model("llama", num_hidden_layers=layers, initializer_range=0.1)

        def run_model() -> None:
            for _ in range(passes):
                model(input_ids=batch["input_ids"], attention_mask=mask)

        with Waits() as counted:
            run(model, run_model if options is None else [batch] * passes, **options or {})
        return counted.count

    assert waits(1, 4) - waits(1, 2) == waits(2, 4) - waits(2, 2)
