"""Calibration that cannot go on as asked: malformed batches, NaN, missing memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from kinds import Make
from raw_inputs import Flat, check, inputs_read, pad, random_ids
from torch import Tensor, nn

from corda_kernels.calibration import Covariance, CovarianceSet, calibrate
from corda_kernels.calibration import run as run_module
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.errors import (
    CalibrationError,
    ConfigError,
    CordaWarning,
    NonFiniteActivationError,
    OutOfMemoryWarning,
    PaddingWarning,
)


def run(model: nn.Module, batches: Iterable[Any], **options: Any) -> CovarianceSet:
    return calibrate(model, batches, outlier_threshold=1.0, **({"progress": False} | options))


def test_a_layer_that_is_never_called_is_an_error_that_names_it() -> None:
    with pytest.raises(CalibrationError, match=r"1 target layer\(s\) .*: unused;"):
        run(Flat(), [random_ids(2, 5)])


def test_a_layer_that_is_never_called_can_be_skipped() -> None:
    found = run(Flat(), [random_ids(2, 5)], on_unseen="skip")
    assert list(found) == ["used"]
    assert found.left_out == {"unused": "never called during calibration"}


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [torch.zeros(0, 4, dtype=torch.int64)],
        [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3)}],
        iter(()),
    ],
)
def test_batches_without_a_token_are_an_error(batches: Iterable[Any]) -> None:
    with pytest.raises(CalibrationError, match="no tokens to calibrate on"):
        run(Flat(), batches)


@pytest.mark.parametrize("batch", [{}, {"input_ids": [[1]]}, [1, 2], torch.ones(2, 3)], ids=str)
def test_a_malformed_batch_is_named_by_its_number(batch: Any) -> None:
    with pytest.raises(CalibrationError, match=r"batch 1 \(counted from 0\) has no token ids"):
        run(Flat(), [random_ids(1, 3), batch])


@pytest.mark.parametrize("token", [-1, 64, 10**6])
def test_tokens_that_the_model_does_not_have_are_named(tiny_model: Make, token: int) -> None:
    ids = random_ids(2, 5)
    spoilt = ids.clone()
    spoilt[1, 2] = token
    says = rf"batch 1 .counted from 0. holds token {token}, .* tokens are 0 to 63: the tokenizer"
    with pytest.raises(CalibrationError, match=says):
        run(tiny_model("llama"), [ids, spoilt])
    run(tiny_model("llama"), [random_ids(2, 5).clamp(0, 63), torch.tensor([[0, 63]])])
    mask = torch.ones_like(spoilt)
    mask[1, 2:] = 0  # of padding nobody asks what it is
    run(tiny_model("llama"), [{"input_ids": spoilt, "attention_mask": mask}])


@pytest.mark.parametrize(
    ("architecture", "positions"), [("gpt2", 64), ("opt", 24), ("gptj", 24), ("llama", None)]
)
def test_sequences_longer_than_a_table_of_positions_are_refused(
    tiny_model: Make, architecture: str, positions: int | None
) -> None:
    if architecture in ("opt", "gptj"):
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 32, "rotary_dim": 4, "vocab_size": 64}
        config = AutoConfig.for_model(architecture, max_position_embeddings=positions, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(architecture)
    run(model, [random_ids(1, positions or 64)])
    if positions is None:
        with pytest.warns(CordaWarning, match=r"100 tokens, .* max_position_embeddings is 64") as w:
            run(model, [random_ids(1, 100), random_ids(1, 100)])
        assert len(w) == 1
    if positions is not None:
        says = rf"batch 1 .* {positions + 1} tokens, .* lower --seq-len to {positions}"
        with pytest.raises(CalibrationError, match=says):
            run(model, [random_ids(1, 3), random_ids(2, positions + 1)])


def test_an_empty_batch_among_others_is_passed_over() -> None:
    ids = random_ids(2, 5)
    found = run(Flat(), [ids, ids[:0], ids], on_unseen="skip")["used"]
    assert (found.tokens, found.calls) == (20, 1)  # the others run together


def test_padding_without_a_mask_is_warned_about(tiny_model: Make) -> None:
    ids = random_ids(2, 6)
    ids[1, 3:] = 0
    model = tiny_model("llama", pad_token_id=0)
    with pytest.warns(PaddingWarning, match="batch 1 ") as caught:
        calibrate(model, [random_ids(2, 6), ids], progress=False)
    assert caught[0].filename == __file__


def test_nan_is_reported_with_the_layer_and_the_batch_of_its_tokens(
    tiny_model: Make,
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = torch.nan
    ids = random_ids(2, 6)
    ids[1, 3] = 2
    with pytest.raises(NonFiniteActivationError, match=r"q_proj .* in batch 1 ") as caught:
        run(model, [random_ids(2, 6), ids, random_ids(2, 6)])
    assert caught.value.layer == "model.layers.0.self_attn.q_proj"
    assert caught.value.batch == 1


@pytest.mark.parametrize(
    ("nan_in", "reported"),
    [
        ("layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_proj"),
        ("layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"),
        ("layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_nan_weight_is_reported_at_the_first_layer_that_reads_its_output(
    tiny_model: Make, nan_in: str, reported: str
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.get_submodule(nan_in).weight[3, 1] = torch.nan
    with pytest.raises(NonFiniteActivationError) as caught:
        run(model, [random_ids(2, 6)])
    assert (caught.value.layer, caught.value.batch) == (reported, 0)


def test_float16_overflow_is_reported(tiny_model: Make) -> None:
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(NonFiniteActivationError, match="float16 overflows"):
        run(model, [random_ids(2, 6)])


def test_a_model_that_carries_an_adapter_is_refused(tiny_model: Make) -> None:
    model = tiny_model("llama")
    model.peft_config = {"default": None}
    with pytest.raises(CalibrationError, match="carries a PEFT adapter already"):
        run(model, [random_ids(2, 5)])


def test_a_model_with_layers_of_ours_is_refused(
    calibrated: Callable[..., Any], adapt: Callable[..., nn.Module]
) -> None:
    model = adapt(calibrated(), use_peft=False)
    with pytest.raises(CalibrationError, match="q_proj carries an adapter already"):
        run(model, [random_ids(2, 5)])


def test_a_function_that_runs_the_model_shows_no_losses(tiny_model: Make) -> None:
    def run_model() -> None:
        raise AssertionError("refused before the work")

    with pytest.raises(ConfigError, match="give batches"):
        calibrate(tiny_model("llama"), run_model, sides="both", progress=False)


def test_padding_in_what_a_function_runs_is_told_by_a_mask_or_warned_of(tiny_model: Make) -> None:
    model = tiny_model("llama", pad_token_id=0)
    padded = torch.cat([random_ids(2, 5), torch.zeros(2, 3).long()], 1)
    with pytest.warns(PaddingWarning, match=r"call 1 of the model .* no attention mask"):
        calibrate(model, lambda: [model(ids) for ids in (random_ids(2, 5), padded)])
    mask = torch.where(padded == 0, -1e9, 0.0)
    with pytest.raises(CalibrationError, match=r"call 0 .* other values than 1 .* and 0"):
        calibrate(model, lambda: model(padded, attention_mask=mask))


class Cramped(nn.Module):
    """A model that has memory for so many sequences at a time."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.rows = rows
        self.ran: list[int] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.embedding(input_ids))
        if len(input_ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.ran.append(len(input_ids))
        return self.second(x)


def test_out_of_memory_starts_again_with_smaller_batches() -> None:
    model = Cramped(rows=2)
    batches: list[Any] = [random_ids(1, 5), random_ids(9, 4), pad([random_ids(3)] * 5, "right")]
    with pytest.warns(OutOfMemoryWarning) as caught:
        found = run(model, batches)
    ends = [str(warning.message).partition("with at most ")[2] for warning in caught]
    assert ends == ["4 sequence(s) at a time", "2 sequence(s) at a time"]
    assert caught[0].filename == __file__
    assert model.ran[-3:] == [2, 2, 1]
    roomy = Cramped(rows=9)
    roomy.load_state_dict(model.state_dict())
    expected = inputs_read(roomy, [batches[0], batches[1], batches[2]["input_ids"]])
    check(found, expected, tolerance=1e-6)


def test_out_of_memory_for_a_single_sequence_says_what_to_do() -> None:
    with (
        pytest.warns(OutOfMemoryWarning, match="at most 1 sequence"),
        pytest.raises(CalibrationError, match=r"for a single sequence, .*--memory-limit"),
    ):
        run(Cramped(rows=0), [random_ids(2, 5)])
    with pytest.raises(CalibrationError, match="a list of batches, which can be started again"):
        run(Cramped(rows=0), iter([random_ids(2, 5)]))


def test_sums_that_a_device_has_no_memory_for_are_made_on_the_host(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "has_own_memory", lambda device: True)
    model, batches = tiny_model("llama"), [random_ids(2, 9), random_ids(1, 5)]
    expected = run(model, batches)
    add = InputCapture._add
    tried: list[bool] = []

    def cramped(capture: InputCapture, *arguments: Any) -> None:
        tried.append(capture.on_host)
        if not capture.on_host:
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(capture, *arguments)

    monkeypatch.setattr(InputCapture, "_add", cramped)
    with pytest.warns(OutOfMemoryWarning) as caught:
        found = run(model, batches)
    assert str(caught[-1].message).endswith(
        "with covariances that the CPU sums up, which takes longer"
    )
    assert caught[-1].filename == __file__
    assert tried[:3] == [False, False, True]
    assert list(found) == list(expected)
    for name, covariance in found.items():
        torch.testing.assert_close(covariance.matrix, expected[name].matrix)
        assert torch.equal(covariance.absmax, expected[name].absmax)
        assert covariance.calls == 2  # in full batches again


def test_nothing_is_warned_about_on_plain_text(tiny_model: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(tiny_model("llama"), [random_ids(2, 5)])
    assert all(isinstance(covariance, Covariance) for covariance in found.values())
