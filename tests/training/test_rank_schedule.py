from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Calibrated, Make
from pairs import pairs
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corda_kernels import RankSchedule, save_adapter
from corda_kernels.adapter import LayerAdapter, live_adapter
from corda_kernels.errors import AdapterError, ConfigError

pytestmark = pytest.mark.slow


PROMPT = torch.tensor([[5, 9, 33, 17], [40, 8, 21, 50]])
STEPS = 6
FULL = RankSchedule("linear", first=1.0, last=1.0, over=1)
HALF = RankSchedule("linear", first=0.5, last=0.5, over=1)
FALLING = RankSchedule("linear", first=1.0, last=0.0, over=4)


def generate(model: Any, ranks: Any = None, **options: Any) -> Any:
    """Tokens and logits of a few steps."""
    return model.generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[] if ranks is None else [ranks],
        **{"do_sample": False, "min_new_tokens": STEPS, "pad_token_id": 0} | options,
    )


def scheduled(model: Any, schedule: RankSchedule, **options: Any) -> tuple[Any, Any]:
    with schedule.apply(model) as ranks:
        return generate(model, ranks, **options), ranks


@torch.no_grad()
def revert(layer: LayerAdapter, components: slice) -> None:
    """Puts components back where they started; of a LoRA that is to delete both their rows."""
    if layer.initial is not None:
        layer.A[components] = layer.initial.A[components]
        layer.B[:, components] = layer.initial.B[:, components]
        return
    for half in layer.A.view(2, -1, layer.A.shape[1]):
        half[components] = 0
    for half in layer.B.view(layer.B.shape[0], 2, -1).unbind(1):
        half[:, components] = 0


def unused(mode: str, rank: int) -> slice:
    """Components that are not among the first `rank` of 4."""
    return slice(rank, 4) if mode == "ipm" else slice(0, 4 - rank)


def is_hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks for module in model.modules())


@pytest.fixture
def adapted(calibrated: Calibrated, adapt: Make, train: Make) -> Callable[..., Any]:
    """A trained adapter of rank 4; mode "lora" is PEFT's own."""

    def make(mode: str = "ipm", **options: Any) -> Any:
        if mode == "lora":
            config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            return train(get_peft_model(calibrated()[0], config))
        return train(adapt(calibrated(), mode=mode, **options))

    return make


def test_a_share_goes_from_first_to_last() -> None:
    for kind, quarter in (("linear", 0.25), ("entropy", 0.25), ("cosine", 0.5 - math.sqrt(0.125))):
        schedule = RankSchedule(kind, first=1.0, last=0.2, over=8)
        shares = [schedule.share(at) for at in (0, 2, 4, 8, 100)]
        assert shares == pytest.approx([1.0, 1.0 - 0.8 * quarter, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("mode", ["ipm", "kpm", "lora"])
def test_the_full_rank_changes_no_bit(adapted: Callable[..., Any], mode: str) -> None:
    model = adapted(mode)
    expected = generate(model)
    found, ranks = scheduled(model, FULL)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))
    assert ranks.ranks == [4.0] * STEPS
    assert ranks.average_rank == 4.0


@pytest.mark.parametrize(
    ("form", "mode", "use_peft"),
    pairs([{}, {"hold": 8}, {"residual": "weight"}], ["ipm", "kpm"], [True, False]),
    ids=str,
)
def test_components_beyond_the_rank_are_as_they_were_at_the_start(
    adapted: Callable[..., Any], mode: str, use_peft: bool, form: dict[str, Any]
) -> None:
    model = adapted(mode, use_peft=use_peft, **form)
    whole = generate(model).logits
    found, ranks = scheduled(model, HALF)
    assert ranks.average_rank == 2.0
    for layer in live_adapter(model).layers.values():
        revert(layer, unused(mode, 2))
    expected = generate(model)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits)
    assert (found.logits[0] - whole[0]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("kept", [1, 3])
def test_a_component_is_its_two_rows_of_the_lora(
    adapted: Callable[..., Any], mode: str, kept: int
) -> None:
    """By a LoRA that has no other rows, at the rank and the scaling that are left."""
    model = adapted(mode)
    found, _ = scheduled(model, RankSchedule("linear", first=kept / 4, last=kept / 4, over=1))
    components = torch.arange(kept) if mode == "ipm" else torch.arange(4 - kept, 4)
    rows = torch.cat([components, components + 4])
    for name, layer in live_adapter(model).layers.items():
        lora = model.get_base_model().get_submodule(name)
        assert layer.rank == 8
        lora.lora_A["default"].weight = nn.Parameter(layer.A[rows].detach())
        lora.lora_B["default"].weight = nn.Parameter(layer.B[:, rows].detach())
    expected = generate(model)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits)


def test_what_stock_peft_has_loaded_is_cut_off_by_its_rows(
    adapted: Callable[..., Any], calibrated: Calibrated, tmp_path: Path
) -> None:
    save_adapter(adapted("kpm"), tmp_path)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path)
    found, ranks = scheduled(stock, HALF)
    assert ranks.average_rank == 4
    for layer in live_adapter(stock).layers.values():
        with torch.no_grad():
            layer.A[4:] = 0
    torch.testing.assert_close(found.logits, generate(stock).logits)


@pytest.mark.parametrize("mode", ["ipm", "lora"])
def test_no_component_at_all_is_the_base(
    adapted: Callable[..., Any], calibrated: Calibrated, mode: str
) -> None:
    schedule = RankSchedule("cosine", first=0.0, last=0.0, over=1)
    found, _ = scheduled(adapted(mode), schedule)
    torch.testing.assert_close(found.logits, generate(calibrated()[0]).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_each_step_has_its_rank_and_the_cache_keeps_earlier_ones(
    adapted: Callable[..., Any], mode: str
) -> None:
    model = adapted(mode)
    found, ranks = scheduled(model, FALLING)
    assert ranks.ranks == [4, 3, 2, 1, 0, 0]
    assert ranks.average_rank == pytest.approx(10 / 6)
    ids, cache = PROMPT, None
    with torch.no_grad():
        for step, rank in enumerate([4, 3, 2, 1, 0, 0]):
            by_hand = copy.deepcopy(model)
            for layer in live_adapter(by_hand).layers.values():
                revert(layer, unused(mode, rank))
            output = by_hand(input_ids=ids, past_key_values=cache, use_cache=True)
            torch.testing.assert_close(found.logits[step], output.logits[:, -1])
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values


def test_ranks_differ_by_layer_and_are_averaged(calibrated: Calibrated, adapt: Make) -> None:
    model = adapt(calibrated(), mode="kpm", budget="r=4", rank_multiple=2)
    full = [layer.rank // 2 for layer in live_adapter(model).layers.values()]
    assert len(set(full)) > 1
    _, ranks = scheduled(model, HALF)
    assert ranks.average_rank == pytest.approx(sum(full) / len(full) / 2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_the_rank_follows_the_entropy_of_what_was_just_sampled_from(
    adapted: Callable[..., Any], options: dict[str, Any]
) -> None:
    schedule = RankSchedule("entropy", first=0.0, last=1.0, over=6.0)
    found, ranks = scheduled(adapted(), schedule, **options)
    expected = [4]
    for logits in found.logits[:-1]:
        probabilities = logits.double().softmax(-1)
        entropy = float(-(probabilities * probabilities.log()).sum(-1).mean())
        expected.append(round(4 * entropy / 6.0))
    assert ranks.ranks == expected
    assert min(expected) < 4


def test_sequences_that_have_ended_have_no_say_in_the_entropy(adapted: Callable[..., Any]) -> None:
    schedule = RankSchedule("entropy", first=0.0, last=1.0, over=math.log(64))
    scores = torch.stack([torch.zeros(64), torch.eye(64)[7] * 1e4])
    for last, share in ((3, 0.5), (2, 1.0)):  # 2 ends a sequence
        with schedule.apply(adapted()) as ranks:
            assert torch.equal(ranks(torch.tensor([[5, 6], [5, last]]), scores), scores)
            assert ranks.rank(100) == 100 * share
    with schedule.apply(adapted()) as ranks:
        ranks(torch.tensor([[5, 2], [5, 2]]), scores)
        assert ranks.rank(100) == 50


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_beams_run_in_batches(adapted: Callable[..., Any], options: dict[str, Any]) -> None:
    model = adapted()
    torch.manual_seed(0)
    plain = generate(model, **options)
    torch.manual_seed(0)
    full, _ = scheduled(model, FULL, **options)
    falling, _ = scheduled(model, FALLING, **options)
    assert torch.equal(plain.sequences, full.sequences)
    assert plain.sequences.shape == falling.sequences.shape


def test_a_block_leaves_nothing_behind(adapted: Callable[..., Any]) -> None:
    model = adapted()
    expected = generate(model).logits
    scheduled(model, HALF)
    assert not is_hooked(model)

    def interrupted() -> None:
        with HALF.apply(model) as ranks:
            assert is_hooked(model)
            generate(model, ranks)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        interrupted()
    assert not is_hooked(model)
    assert all(torch.equal(*pair) for pair in zip(generate(model).logits, expected, strict=True))


def test_a_block_that_saw_no_step_says_so(adapted: Callable[..., Any]) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=r"no step of generation was seen"), HALF.apply(model):
        generate(model)
    assert not is_hooked(model)


def test_a_second_generate_in_one_block_is_refused(adapted: Callable[..., Any]) -> None:
    model = adapted()

    def twice() -> None:
        with HALF.apply(model) as ranks:
            generate(model, ranks)
            generate(model, ranks)

    with pytest.raises(ConfigError, match=r"after 9 tokens come 4: .* one generate"):
        twice()
    assert not is_hooked(model)


def test_a_lora_whose_components_do_not_start_at_zero_is_refused(calibrated: Calibrated) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="orthogonal")
    model = get_peft_model(calibrated()[0], config)
    with pytest.raises(AdapterError, match=r"orthogonal.*needs another start"), HALF.apply(model):
        pass


def test_a_model_without_adapter_is_refused(calibrated: Calibrated) -> None:
    with pytest.raises(AdapterError, match="carries no adapter"), HALF.apply(calibrated()[0]):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "stepwise"}, "kind must be "),
        ({"first": 1.5}, "a share from 0 to 1"),
        ({"last": math.nan}, "a share from 0 to 1"),
        ({"over": 0}, "over must be positive"),
        ({"over": math.inf}, "over must be positive"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankSchedule(**{"kind": "linear", "first": 1.0, "last": 0.5, "over": 8} | options)
