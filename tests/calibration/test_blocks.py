from __future__ import annotations

from typing import Any

import pytest
import torch
from block_runs import FIXED, random_batches, stream
from kinds import Make
from torch import Tensor, nn

from corda_kernels import CovarianceSet, calibrate, calibrate_blocks
from corda_kernels.calibration.kept_text import KeptText
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import (
    CalibrationError,
    LeftOutWarning,
    NonFiniteActivationError,
    TargetError,
)
from corda_kernels.structure import decoder_blocks

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# Architectures beyond those of the fixture: rotary embeddings by layer type, parallel blocks,
# blocks that take everything by name, learned positions.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **SMALL,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {**SMALL, "intermediate_size": 48},
}


@pytest.fixture(scope="module")
def make(tiny_model: Make) -> Make:
    def made(architecture: str) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        if architecture in FIXED:
            return tiny_model(architecture, initializer_range=0.2, **FIXED[architecture])
        config = AutoConfig.for_model(architecture, **OTHERS[architecture])
        return AutoModelForCausalLM.from_config(config).eval()

    return made


def same(found: CovarianceSet, whole: CovarianceSet) -> None:
    """Whether the set says of its layers what the whole says of them."""
    assert [n for _, n in found.groups()] == [n for _, n in whole.groups() if n[0] in found]
    for name, covariance in found.items():
        expected = whole[name]
        error = (covariance.matrix - expected.matrix).norm() / expected.matrix.norm()
        assert error < 1e-6, name
        assert (covariance.tokens, covariance.calls) == (expected.tokens, expected.calls)
        torch.testing.assert_close(covariance.absmax, expected.absmax, rtol=1e-5, atol=0)
        assert torch.equal(covariance.outlier_count, expected.outlier_count)


@pytest.mark.parametrize("architecture", [*FIXED, *OTHERS])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_blocks_give_the_covariances_of_one_pass(make: Make, architecture: str) -> None:
    model, batches = make(architecture), random_batches()
    whole = calibrate(model, batches, outlier_threshold=1.0, progress=False)
    found = stream(model, batches)
    assert [name for (block,) in found for name in block] == list(whole)
    for (block,) in found:
        same(block, whole)
        assert block.left_out == whole.left_out
        assert block.provenance == whole.provenance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_hidden_states_keep_the_models_dtype(make: Make, dtype: torch.dtype) -> None:
    model, batches = make("llama").to(dtype), random_batches()
    whole = calibrate(model, batches, outlier_threshold=1.0, progress=False)
    for (block,) in stream(model, batches):
        same(block, whole)


def test_peft_normalization_is_per_call_here_too(make: Make) -> None:
    model, batches = make("llama"), random_batches()
    whole = calibrate(model, batches, outlier_threshold=1.0, normalize="peft", progress=False)
    for (block,) in stream(model, batches, normalize="peft"):
        same(block, whole)
        assert block.normalize == "peft"


def test_parts_are_every_other_batch(make: Make) -> None:
    model, batches = make("gpt2"), random_batches()
    halves = [
        calibrate(model, batches[i::2], outlier_threshold=1.0, progress=False) for i in range(2)
    ]
    for parts in stream(model, batches, parts=2):
        for block, half in zip(parts, halves, strict=True):
            same(block, half)
            assert block.provenance == half.provenance


def test_targets_choose_the_blocks(make: Make) -> None:
    model, batches = make("llama"), random_batches()
    ((block,),) = stream(model, batches, targets=r".*\.1\..*(q|down)_proj")
    assert list(block) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    with pytest.raises(TargetError, match="no linear layer matches"):
        stream(model, batches, targets=["absent"])


def test_a_block_runs_once_over_the_text_and_one_after_the_other(make: Make) -> None:
    model, batches, ran = make("llama"), random_batches(), []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    blocks = calibrate_blocks(model, batches, progress=False)
    ran.clear()  # to learn what a block returns, the first one is tried
    for index, _ in enumerate(blocks):
        assert ran == [index] * 5  # 1 + 3 + 1 lengths
        ran.clear()


@pytest.mark.slow
def test_what_a_block_needed_is_free_before_the_next(make: Make) -> None:
    import gc
    import weakref

    model = make("llama")
    matrices: list[weakref.ref[Tensor]] = []
    left: list[int] = []

    def count(*_: Any) -> None:
        gc.collect()
        left.append(sum(matrix() is not None for matrix in matrices))

    blocks = calibrate_blocks(model, random_batches(), progress=False)
    model.model.layers[1].register_forward_pre_hook(count)
    for block in blocks:
        matrices += [weakref.ref(covariance.matrix) for covariance in block.values()]
        del block
    assert set(left) == {0}


def test_equal_masks_and_rotary_embeddings_are_kept_once(make: Make) -> None:
    model = make("gemma2")
    run = CalibrationRun(model, progress=False)
    blocks = list(decoder_blocks(model).values())
    batches = [torch.ones(1, 9).long()] * 5
    text = KeptText(run, blocks, batches)
    text.record()
    kept = {
        id(tensor)
        for current in text.sequences
        for call in current.calls
        for tensor in _tensors(call)
    }
    assert 2 < len(kept) <= 6  # cos, sin, positions, two masks: not 5 × 3 times as many


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [t for entry in value for t in _tensors(entry)] if isinstance(value, list | tuple) else []
    )


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(make: Make, failing: bool) -> None:
    model = make("llama").train()
    forwards = {name: module.forward for name, module in model.named_modules()}
    batches: list[Any] = [*random_batches(), "no batch"] if failing else random_batches()
    if failing:
        with pytest.raises(CalibrationError, match=r"batch 3 \(counted from 0\) has no token ids"):
            stream(model, batches)
    else:
        stream(model, batches)
    assert all(module.training for module in model.modules())
    assert {name: module.forward for name, module in model.named_modules()} == forwards
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_fetched_block_by_block(
    make: Make, where: str, tmp_path: Any
) -> None:
    from accelerate import cpu_offload, disk_offload

    model, batches = make("llama"), random_batches()
    whole = calibrate(model, batches, outlier_threshold=1.0, progress=False)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    for (block,) in stream(model, batches):
        same(block, whole)
    again = calibrate(model, batches, outlier_threshold=1.0, progress=False)
    same(again, whole)


def test_nan_is_reported_with_its_batch_and_tokens(make: Make) -> None:
    model, batches = make("llama"), random_batches()
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = torch.nan
    batches[1]["input_ids"][1, 3] = 2
    with pytest.raises(NonFiniteActivationError) as caught:
        stream(model, batches)
    assert caught.value.layer == "model.layers.0.self_attn.q_proj"
    assert (caught.value.batch, caught.value.tokens) == (1, (48, 74))


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_layers_that_are_never_called_are_named(make: Make) -> None:
    model = make("llama")
    model.model.layers[1].extra = nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match=r"1 target layer\(s\).*layers.1.extra"):
        stream(model, random_batches())
    found = stream(model, random_batches(), on_unseen="skip")
    assert "model.layers.1.extra" in found[1][0].left_out


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4, dtype=torch.int64)]])
def test_no_tokens_are_an_error(make: Make, batches: Any) -> None:
    with pytest.raises(CalibrationError, match="no tokens to calibrate on"):
        stream(make("llama"), batches)


def test_a_batch_that_does_not_fit_the_model_is_named(make: Make) -> None:
    batches = [*random_batches(), torch.ones(1, 65, dtype=torch.int64)]
    with pytest.raises(CalibrationError, match=r"batch 3 \(counted from 0\) has sequences of 65"):
        stream(make("gpt2"), batches, parts=2)


def test_fewer_batches_than_parts_are_an_error(make: Make) -> None:
    with pytest.raises(CalibrationError, match="of 2 parts of the text, part 1 is empty"):
        stream(make("llama"), random_batches()[:1], parts=2)


def test_a_head_among_the_targets_is_refused(make: Make) -> None:
    with pytest.raises(
        CalibrationError, match="lm_head lies outside of its blocks: leave that out of"
    ):
        stream(make("llama"), random_batches(), targets=["lm_head", "q_proj"])


class Chain(nn.Module):
    """Blocks, and something that a model may do besides running them one after the other."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 6)
        self.layers = nn.ModuleList(Block(habit) for _ in range(2))
        if habit == "share":
            self.layers[1].linear = self.layers[0].linear
        self.habit = habit

    def forward(self, input_ids: Tensor) -> Tensor:
        x, more = self.embedding(input_ids), 0
        for block in reversed(self.layers) if self.habit == "reverse" else self.layers:
            x = block(x, more) if self.habit == "hand on" else block(x)
            if isinstance(x, tuple):
                x, more = x
            if self.habit == "between":
                x = 2 * x
            if self.habit == "stop":
                break
        return x


class Block(nn.Module):
    def __init__(self, habit: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.habit = habit

    def forward(self, x: Tensor, more: Tensor | int = 0) -> Any:
        y = self.linear(x) + more
        if self.habit == "dictionary":
            return {"y": y}
        return (y, 2 * y) if self.habit in ("two", "hand on") else y


@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ("share", "its blocks share layers"),
        ("reverse", "its blocks do not run once each in their order"),
        ("between", "something happens to the hidden states between its blocks"),
        ("stop", "not all of its blocks ran"),
        ("hand on", "its blocks read more of each other than hidden states"),
        ("dictionary", "its blocks do not return hidden states first"),
    ],
)
def test_a_model_that_does_more_than_run_its_blocks_is_refused(habit: str, reason: str) -> None:
    with pytest.raises(CalibrationError, match=f"block by block, because {reason}: calibrate"):
        stream(Chain(habit), random_batches())


def test_what_blocks_return_beside_hidden_states_and_nobody_reads_is_no_obstacle() -> None:
    batches = random_batches()
    for (block,) in stream(model := Chain("two"), batches):
        same(block, calibrate(model, batches, outlier_threshold=1.0, progress=False))


def test_fused_experts_are_warned_of_once(make: Make) -> None:
    with pytest.warns(LeftOutWarning) as caught:
        stream(make("mixtral"), random_batches())
    assert len(caught) == 1
