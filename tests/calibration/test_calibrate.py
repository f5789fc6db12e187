from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from kinds import Make
from raw_inputs import Flat, check, distance, inputs_read, linear_names, pad, random_ids
from torch import nn

from corda_kernels.calibration import (
    CovarianceSet,
    calibrate,
)
from corda_kernels.errors import (
    LeftOutWarning,
    TargetError,
)

DENSE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2"]
GROUPED = [name for name in DENSE if name != "gpt2"]  # q, k, v and gate, up are layers of their own
ROUTED = ["mixtral", "qwen3_moe"]
THRESHOLD = 1.0


def run(model: nn.Module, batches: Iterable[Any], **options: Any) -> CovarianceSet:
    return calibrate(model, batches, outlier_threshold=THRESHOLD, **({"progress": False} | options))


@pytest.mark.parametrize("architecture", DENSE)
def test_covariances_are_those_of_the_raw_inputs(tiny_model: Make, architecture: str) -> None:
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


@pytest.mark.parametrize(
    ("architecture", "side"), list(zip(DENSE, 3 * ["left", "right"], strict=True))
)
def test_padding_never_counts(tiny_model: Make, architecture: str, side: str) -> None:
    model = tiny_model(architecture)
    sequences = [random_ids(length) for length in (3, 12, 7, 1, 12)]
    found = run(model, [pad(sequences[:3], side), pad(sequences[3:], side)])
    check(found, inputs_read(model, [ids[None] for ids in sequences]), tolerance=1e-5)


@pytest.mark.parametrize("architecture", GROUPED)
def test_layers_that_read_one_tensor_hold_one_matrix(tiny_model: Make, architecture: str) -> None:
    found = run(tiny_model(architecture), [random_ids(2, 9), random_ids(2, 5)])
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v, o = (found[f"{layer}.self_attn.{name}_proj"] for name in "qkvo")
        gate, up = (found[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up"))
        assert q is k is v
        assert gate is up
        assert len({c.matrix.data_ptr() for c in (q, o, gate)}) == 3
    assert len(found.groups()) == 8


def test_conv1d_is_calibrated_on_its_input_side(tiny_model: Make) -> None:
    found = run(tiny_model("gpt2"), [random_ids(2, 9)])
    assert {name.rpartition(".")[2]: len(c.absmax) for name, c in found.items()} == {
        "c_attn": 32,
        "c_fc": 32,
        "c_proj": 128,
    }


@pytest.mark.parametrize("architecture", [*DENSE, *ROUTED])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_the_head_is_no_target_and_never_runs(tiny_model: Make, architecture: str) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the head was called")

    model = tiny_model(architecture)
    model.lm_head.register_forward_pre_hook(fail)
    assert list(run(model, [random_ids(2, 5)])) == linear_names(model)


def test_a_head_that_is_asked_for_is_calibrated(tiny_model: Make) -> None:
    found = run(tiny_model("llama"), [random_ids(2, 5)], targets=["lm_head", "q_proj"])
    assert [len(c.absmax) for c in found.values()] == [32, 32, 32]
    assert found["lm_head"].tokens == 10


def test_targets_choose_the_layers(tiny_model: Make) -> None:
    model = tiny_model("llama")
    found = run(model, [random_ids(2, 5)], targets=r".*\.0\..*(q|down)_proj")
    assert list(found) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    with pytest.raises(TargetError, match="no linear layer matches"):
        run(model, [random_ids(2, 5)], targets=["absent"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_half_precision_models_are_kept_in_float32(
    tiny_model: Make, dtype: torch.dtype
) -> None:
    model = tiny_model("llama").to(dtype)
    batches = [random_ids(8, 32) for _ in range(3)]
    found = run(model, batches)
    assert {covariance.matrix.dtype for covariance in found.values()} == {torch.float32}
    check(found, inputs_read(model, batches), tolerance=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_normalization_is_the_mean_over_calls_of_the_scaled_inputs(
    tiny_model: Make, architecture: str
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
def test_fused_experts_are_left_out_by_name(tiny_model: Make, architecture: str) -> None:
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


def test_chosen_targets_warn_of_nothing_left_out(tiny_model: Make) -> None:
    assert not run(tiny_model("mixtral"), [random_ids(2, 5)], targets=["q_proj"]).left_out


def test_inputs_may_come_flattened() -> None:
    model, ids = Flat(), random_ids(3, 5)
    mask = torch.ones_like(ids)
    mask[1, 2:] = 0
    found = run(model, [{"input_ids": ids, "attention_mask": mask}], targets=["used"])["used"]
    x = model.embedding(ids[mask.bool()]).detach().double()
    assert found.tokens == len(x) == 12
    assert distance(found.matrix, x.T @ x / len(x)) < 1e-6


def hooks(model: nn.Module) -> dict[str, list[list[int]]]:
    return {
        name: [list(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
        for name, module in model.named_modules()
    }


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("failing", [False, True], ids=["success", "exception"])
def test_modes_and_hooks_are_restored(tiny_model: Make, failing: bool) -> None:
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


def test_the_model_runs_in_eval_mode(tiny_model: Make) -> None:
    model = tiny_model("gpt2", resid_pdrop=0.9, embd_pdrop=0.9)
    batches = [random_ids(2, 9)]
    read = inputs_read(model, batches)
    check(run(model.train(), batches), read, tolerance=1e-5)


def test_the_model_is_left_as_it_was(tiny_model: Make) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    run(model, [random_ids(2, 5)])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_no_gradient_is_recorded_in_any_mode(tiny_model: Make, mode: Any) -> None:
    model, batches = tiny_model("llama"), [random_ids(2, 5)]
    with mode():
        found = run(model, batches)
    check(found, inputs_read(model, batches), tolerance=1e-5)
    assert not any(c.matrix.requires_grad or c.matrix.is_inference() for c in found.values())


def test_batches_may_be_any_iterable_of_any_mapping(tiny_model: Make) -> None:
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


def test_calibrations_of_two_halves_merge_to_that_of_the_whole(tiny_model: Make) -> None:
    model, batches = tiny_model("llama"), [random_ids(2, 9), random_ids(5, 4)]
    merged = run(model, batches[:1]).merge(run(model, batches[1:]))
    check(merged, inputs_read(model, batches), tolerance=1e-5)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_request_and_on_a_terminal_only(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for asked in (False, True):
        run(Flat(), [random_ids(2, 5)], on_unseen="skip", progress=asked)
        assert ("calibrating" in capsys.readouterr().err) == (asked and terminal)


def test_the_set_says_where_it_comes_from(tiny_model: Make) -> None:
    model = tiny_model("llama")
    model.name_or_path = "some/model"
    provenance = run(model, [random_ids(2, 5)]).provenance
    assert provenance["model"] == "some/model"
    assert provenance["tokens"] == 10
    assert run(Flat(), [random_ids(1, 5)], on_unseen="skip").provenance["model"] == "Flat"
