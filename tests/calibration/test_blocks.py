from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from kinds import Make
from torch import Tensor, nn

from corda_kernels import CovarianceSet, calibrate, calibrate_blocks
from corda_kernels.calibration import kept_text as kept_text_module
from corda_kernels.calibration import run as run_module
from corda_kernels.calibration.blocks import calibrate_block_parts
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.kept_text import KeptText, alike
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import (
    CalibrationError,
    LeftOutWarning,
    NonFiniteActivationError,
    OutOfMemoryWarning,
    TargetError,
)
from corda_kernels.memory import has_own_memory
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
FIXED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {
        "sliding_window": 4,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {},
}


def random_batches() -> list[Any]:
    """Batches of several lengths, longer than any sliding window, one of them padded."""
    padded = {
        "input_ids": torch.randint(3, 64, (3, 14)),
        "attention_mask": (torch.arange(14) < torch.tensor([[9], [14], [3]])).long(),
    }
    return [torch.randint(3, 64, (4, 12)), padded, torch.randint(3, 64, (2, 20))]


@pytest.fixture(scope="module")
def make(tiny_model: Make) -> Make:
    def made(architecture: str) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        if architecture in FIXED:
            return tiny_model(architecture, initializer_range=0.2, **FIXED[architecture])
        config = AutoConfig.for_model(architecture, **OTHERS[architecture])
        return AutoModelForCausalLM.from_config(config).eval()

    return made


def stream(model: nn.Module, batches: Iterable[Any], **options: Any) -> list[list[CovarianceSet]]:
    options = {"parts": 1, "outlier_threshold": 1.0, "progress": False} | options
    return list(calibrate_block_parts(model, batches, **options))


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
