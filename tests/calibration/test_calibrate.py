from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels.calibration import (
    Covariance,
    CovarianceSet,
    calibrate,
)
from corda_kernels.calibration import (
    batches as batches_module,
)
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.errors import (
    CalibrationError,
    CordaWarning,
    LeftOutWarning,
    NonFiniteActivationError,
    OutOfMemoryWarning,
    PaddingWarning,
    TargetError,
)

ModelMaker = Callable[..., nn.Module]

DENSE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2"]
GROUPED = [name for name in DENSE if name != "gpt2"]  # q, k, v and gate, up are layers of their own
ROUTED = ["mixtral", "qwen3_moe"]
THRESHOLD = 1.0


def random_ids(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape)


def run(model: nn.Module, batches: Iterable[Any], **options: Any) -> CovarianceSet:
    return calibrate(model, batches, outlier_threshold=THRESHOLD, **({"progress": False} | options))


def linear_names(model: nn.Module) -> list[str]:
    """Every layer that holds a matrix and is neither embedding nor head."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    ]


@torch.no_grad()
def inputs_read(model: nn.Module, sequences: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """What each linear layer reads, call by call, as (n, in) float64, by hooks of our own."""
    read: dict[str, list[Tensor]] = {name: [] for name in linear_names(model)}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: read[name].append(args[0].flatten(0, -2).double())
        )
        for name in read
    ]
    for ids in sequences:
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return read


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(found: CovarianceSet, read: dict[str, list[Tensor]], *, tolerance: float) -> None:
    """Holds every covariance to (1/n) Σ x xᵀ over all inputs read, in float64."""
    assert list(found) == list(read)
    for name, covariance in found.items():
        x = torch.cat(read[name])
        assert covariance.tokens == len(x), name
        assert distance(covariance.matrix, x.T @ x / len(x)) < tolerance, name
        assert torch.equal(covariance.matrix, covariance.matrix.T), name
        assert distance(covariance.absmax, x.abs().amax(0)) < tolerance, name


def pad(sequences: list[Tensor], side: str) -> dict[str, Tensor]:
    """One batch of all sequences (length,), padded on one side with a token that is also text."""
    longest = max(len(ids) for ids in sequences)

    def row(ids: Tensor, fill: int) -> Tensor:
        padding = torch.full((longest - len(ids),), fill)
        return torch.cat([ids, padding] if side == "right" else [padding, ids])

    return {
        "input_ids": torch.stack([row(ids, 5) for ids in sequences]),
        "attention_mask": torch.stack([row(torch.ones_like(ids), 0) for ids in sequences]),
    }


@pytest.mark.parametrize("architecture", DENSE)
def test_covariances_are_those_of_the_raw_inputs(tiny_model: ModelMaker, architecture: str) -> None:
    model = tiny_model(architecture)
    batches = [random_ids(1, 9), random_ids(4, 7), random_ids(3, 16)]
    found, read = run(model, batches), inputs_read(model, batches)
    check(found, read, tolerance=1e-5)
    for name, covariance in found.items():
        x = torch.cat(read[name]).abs()
        assert torch.equal(covariance.absmax, x.amax(0).float())
        assert torch.equal(covariance.outlier_count, (x > THRESHOLD).sum(0))
        assert covariance.outlier_threshold == THRESHOLD
        assert covariance.calls == len(batches)
    assert any(covariance.outlier_count.any() for covariance in found.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", DENSE)
def test_padding_never_counts(tiny_model: ModelMaker, architecture: str, side: str) -> None:
    model = tiny_model(architecture)
    sequences = [random_ids(length) for length in (3, 12, 7, 1, 12)]
    found = run(model, [pad(sequences[:3], side), pad(sequences[3:], side)])
    check(found, inputs_read(model, [ids[None] for ids in sequences]), tolerance=1e-5)


@pytest.mark.parametrize("architecture", GROUPED)
def test_layers_that_read_one_tensor_hold_one_matrix(
    tiny_model: ModelMaker, architecture: str
) -> None:
    found = run(tiny_model(architecture), [random_ids(2, 9), random_ids(2, 5)])
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v, o = (found[f"{layer}.self_attn.{name}_proj"] for name in "qkvo")
        gate, up = (found[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up"))
        assert q is k is v
        assert gate is up
        assert len({c.matrix.data_ptr() for c in (q, o, gate)}) == 3
    assert len(found.groups()) == 8


def test_conv1d_is_calibrated_on_its_input_side(tiny_model: ModelMaker) -> None:
    found = run(tiny_model("gpt2"), [random_ids(2, 9)])
    assert {name.rpartition(".")[2]: len(c.absmax) for name, c in found.items()} == {
        "c_attn": 32,
        "c_fc": 32,
        "c_proj": 128,
    }


@pytest.mark.parametrize("architecture", [*DENSE, *ROUTED])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_the_head_is_no_target_and_never_runs(tiny_model: ModelMaker, architecture: str) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the head was called")

    model = tiny_model(architecture)
    model.lm_head.register_forward_pre_hook(fail)
    assert list(run(model, [random_ids(2, 5)])) == linear_names(model)


def test_a_head_that_is_asked_for_is_calibrated(tiny_model: ModelMaker) -> None:
    found = run(tiny_model("llama"), [random_ids(2, 5)], targets=["lm_head", "q_proj"])
    assert [len(c.absmax) for c in found.values()] == [32, 32, 32]
    assert found["lm_head"].tokens == 10


def test_targets_choose_the_layers(tiny_model: ModelMaker) -> None:
    model = tiny_model("llama")
    found = run(model, [random_ids(2, 5)], targets=r".*\.0\..*(q|down)_proj")
    assert list(found) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    with pytest.raises(TargetError, match="no linear layer matches"):
        run(model, [random_ids(2, 5)], targets=["absent"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_half_precision_models_are_kept_in_float32(
    tiny_model: ModelMaker, dtype: torch.dtype
) -> None:
    model = tiny_model("llama").to(dtype)
    batches = [random_ids(8, 32) for _ in range(3)]
    found = run(model, batches)
    assert {covariance.matrix.dtype for covariance in found.values()} == {torch.float32}
    check(found, inputs_read(model, batches), tolerance=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_normalization_is_the_mean_over_calls_of_the_scaled_inputs(
    tiny_model: ModelMaker, architecture: str
) -> None:
    model = tiny_model(architecture)
    batches = [random_ids(1, length) for length in (9, 4, 17)]
    found = run(model, batches, normalize="peft")
    assert found.normalize == "peft"
    for name, calls in inputs_read(model, batches).items():
        scaled = [x / torch.max(x).abs() for x in calls]
        expected = sum(x.T @ x for x in scaled) / len(calls)
        assert distance(found[name].matrix, expected) < 1e-5, name


@pytest.mark.parametrize("architecture", ROUTED)
def test_fused_experts_are_left_out_by_name(tiny_model: ModelMaker, architecture: str) -> None:
    model = tiny_model(architecture)
    batches = [random_ids(3, 7), random_ids(2, 12)]
    fused = r"model\.layers\.0\.mlp\.experts\.\w+: 4 experts fused"
    with pytest.warns(LeftOutWarning, match=fused) as caught:
        found = calibrate(model, batches, progress=False)
    assert caught[0].filename == __file__
    check(found, inputs_read(model, batches), tolerance=1e-5)
    experts = {
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    }
    assert experts < found.left_out.keys()
    assert not found.keys() & found.left_out.keys()
    assert found.left_out.keys() <= dict(model.named_parameters()).keys()


def test_chosen_targets_warn_of_nothing_left_out(tiny_model: ModelMaker) -> None:
    assert not run(tiny_model("mixtral"), [random_ids(2, 5)], targets=["q_proj"]).left_out


class Flat(nn.Module):
    """A model whose layer reads tokens already flattened, beside a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 6)
        self.used = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.used(self.embedding(input_ids).flatten(0, 1))


def test_inputs_may_come_flattened() -> None:
    model, ids = Flat(), random_ids(3, 5)
    mask = torch.ones_like(ids)
    mask[1, 2:] = 0
    found = run(model, [{"input_ids": ids, "attention_mask": mask}], targets=["used"])["used"]
    x = model.embedding(ids[mask.bool()]).detach().double()
    assert found.tokens == len(x) == 12
    assert distance(found.matrix, x.T @ x / len(x)) < 1e-6


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


@pytest.mark.parametrize("batch", [{"text": "a"}, [1, 2, 3], torch.ones(2, 3)], ids=str)
def test_a_malformed_batch_is_named_by_its_number(batch: Any) -> None:
    with pytest.raises(CalibrationError, match=r"batch 1 \(counted from 0\) has no token ids"):
        run(Flat(), [random_ids(1, 3), batch])


@pytest.mark.parametrize("token", [-1, 64, 10**6])
def test_tokens_that_the_model_does_not_have_are_named(tiny_model: ModelMaker, token: int) -> None:
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
    tiny_model: ModelMaker, architecture: str, positions: int | None
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
    assert (found.tokens, found.calls) == (20, 2)


def test_padding_without_a_mask_is_warned_about(tiny_model: ModelMaker) -> None:
    ids = random_ids(2, 6)
    ids[1, 3:] = 0
    model = tiny_model("llama", pad_token_id=0)
    with pytest.warns(PaddingWarning, match="batch 1 ") as caught:
        calibrate(model, [random_ids(2, 6), ids], progress=False)
    assert caught[0].filename == __file__


def test_nan_is_reported_with_the_layer_and_the_batch_of_its_tokens(
    tiny_model: ModelMaker,
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
    tiny_model: ModelMaker, nan_in: str, reported: str
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.get_submodule(nan_in).weight[3, 1] = torch.nan
    with pytest.raises(NonFiniteActivationError) as caught:
        run(model, [random_ids(2, 6)])
    assert (caught.value.layer, caught.value.batch) == (reported, 0)


def test_float16_overflow_is_reported(tiny_model: ModelMaker) -> None:
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(NonFiniteActivationError, match="float16 overflows"):
        run(model, [random_ids(2, 6)])


def hooks(model: nn.Module) -> dict[str, list[list[int]]]:
    return {
        name: [list(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
        for name, module in model.named_modules()
    }


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("failing", [False, True], ids=["success", "exception"])
def test_modes_and_hooks_are_restored(tiny_model: ModelMaker, failing: bool) -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].mlp.eval()
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: calls.append(2))
    if failing:
        model.model.norm.register_forward_pre_hook(lambda *_: [][0])
    before = hooks(model), modes(model)
    if failing:
        with pytest.raises(IndexError):
            run(model, [random_ids(2, 5)])
    else:
        run(model, [random_ids(2, 5)])
    assert (hooks(model), modes(model)) == before
    assert calls == [2, 1]


def test_the_model_runs_in_eval_mode(tiny_model: ModelMaker) -> None:
    model = tiny_model("gpt2", resid_pdrop=0.9, embd_pdrop=0.9)
    batches = [random_ids(2, 9)]
    read = inputs_read(model, batches)
    check(run(model.train(), batches), read, tolerance=1e-5)


def test_the_model_is_left_as_it_was(tiny_model: ModelMaker) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    run(model, [random_ids(2, 5)])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_no_gradient_is_recorded_in_any_mode(tiny_model: ModelMaker, mode: Any) -> None:
    model, batches = tiny_model("llama"), [random_ids(2, 5)]
    with mode():
        found = run(model, batches)
    check(found, inputs_read(model, batches), tolerance=1e-5)
    assert not any(c.matrix.requires_grad or c.matrix.is_inference() for c in found.values())


def test_batches_may_be_any_iterable_of_any_mapping(tiny_model: ModelMaker) -> None:
    from transformers import BatchEncoding

    model, ids = tiny_model("llama"), random_ids(3, 5)
    forms: list[Iterable[Any]] = [
        [ids],
        (row for row in ids),
        [{"input_ids": ids, "labels": ids}],
        (BatchEncoding({"input_ids": ids}),),
    ]
    read = inputs_read(model, [ids])
    for batches in forms:
        check(run(model, batches), read, tolerance=1e-5)


def test_calibrations_of_two_halves_merge_to_that_of_the_whole(tiny_model: ModelMaker) -> None:
    model, batches = tiny_model("llama"), [random_ids(2, 9), random_ids(5, 4)]
    merged = run(model, batches[:1]).merge(run(model, batches[1:]))
    check(merged, inputs_read(model, batches), tolerance=1e-5)


def test_a_model_that_carries_an_adapter_is_refused(tiny_model: ModelMaker) -> None:
    model = tiny_model("llama")
    model.peft_config = {"default": None}
    with pytest.raises(CalibrationError, match="carries a PEFT adapter already"):
        run(model, [random_ids(2, 5)])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_request_and_on_a_terminal_only(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for asked in (False, True):
        run(Flat(), [random_ids(2, 5)], on_unseen="skip", progress=asked)
        assert ("calibrating" in capsys.readouterr().err) == (asked and terminal)


def test_the_set_says_where_it_comes_from(tiny_model: ModelMaker) -> None:
    model = tiny_model("llama")
    model.name_or_path = "some/model"
    provenance = run(model, [random_ids(2, 5)]).provenance
    assert provenance["model"] == "some/model"
    assert provenance["tokens"] == 10
    assert run(Flat(), [random_ids(1, 5)], on_unseen="skip").provenance["model"] == "Flat"


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
        pytest.raises(CalibrationError, match=r"for a single sequence: .*--memory-limit"),
    ):
        run(Cramped(rows=0), [random_ids(2, 5)])
    with pytest.raises(CalibrationError, match="a list of batches, which can be started again"):
        run(Cramped(rows=0), iter([random_ids(2, 5)]))


def test_sums_that_a_device_has_no_memory_for_are_made_on_the_host(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "has_own_memory", lambda device: True)
    model, batches = tiny_model("llama"), [random_ids(1, 5), random_ids(2, 9)]
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


def test_nothing_is_warned_about_on_plain_text(tiny_model: ModelMaker) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(tiny_model("llama"), [random_ids(2, 5)])
    assert all(isinstance(covariance, Covariance) for covariance in found.values())
