from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from finetuning.data import Batch, Item, collate
from finetuning.training import WARM_UP, train
from peft import LoraConfig, get_peft_model
from torch import nn

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    return get_peft_model(tiny_model("llama"), config)


@pytest.fixture
def batches() -> list[Batch]:
    return [collate([Item([3, 4], [5, 6]), Item([7], [5, 6])])] * 8


def trainable(model: nn.Module) -> list[torch.Tensor]:
    return [each.detach().clone() for each in model.parameters() if each.requires_grad]


def test_it_learns_and_changes_the_adapter_only(model: nn.Module, batches: list[Batch]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, batches, 0.05)
    assert len(losses) == len(batches)
    assert losses[-1] < losses[0] - 0.2
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed
    assert all("lora_" in name for name in changed)


def test_the_first_steps_are_smaller(model: nn.Module, batches: list[Batch]) -> None:
    states = [trainable(model)]
    train(model, batches[:6], 1e-3, after_step=lambda _: states.append(trainable(model)))
    # Adam's first step moves whatever has a gradient by the learning rate.
    moved = max(float((b - a).abs().max()) for a, b in zip(*states[:2], strict=True))
    assert moved == pytest.approx(1e-3 / WARM_UP, rel=1e-3)


def test_a_penalty_is_minimised_but_not_reported(model: nn.Module, batches: list[Batch]) -> None:
    other = copy.deepcopy(model)
    plain = train(model, batches, 0.05)
    adapter = [each for each in other.parameters() if each.requires_grad]

    def penalty() -> torch.Tensor:
        return 1e3 * torch.stack([each.square().sum() for each in adapter]).sum()

    penalised = train(other, batches, 0.05, penalty=penalty)
    assert penalised[0] == plain[0]
    size, size_penalised = (
        sum(float(each.square().sum()) for each in trainable(each_model))
        for each_model in (model, other)
    )
    assert size_penalised < 0.5 * size


def test_steps_are_counted_from_one(model: nn.Module, batches: list[Batch]) -> None:
    steps: list[int] = []
    train(model, batches[:3], 1e-3, after_step=steps.append)
    assert steps == [1, 2, 3]


def test_it_ends_where_the_loss_is_not_finite(model: nn.Module, batches: list[Batch]) -> None:
    def break_it(step: int) -> None:
        if step == 2:
            next(each for each in model.parameters() if each.requires_grad).data.fill_(torch.nan)

    assert len(train(model, batches, 1e-3, after_step=break_it)) == 2
