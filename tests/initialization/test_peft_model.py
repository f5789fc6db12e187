from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from torch import Tensor, nn

from corda_kernels import load_for_training, save_adapter
from corda_kernels.errors import AdapterError
from corda_kernels.initialization.peft_model import adapter_of_peft

Calibrated = Callable[..., tuple[nn.Module, Any]]
Make = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]


def initial(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the frozen factors."""
    return {
        name: value.clone() for name, value in model.state_dict().items() if "corda_initial" in name
    }


def test_stock_peft_sees_a_lora_pair(calibrated: Calibrated, adapt: Make) -> None:
    from peft.tuners.lora import Linear

    model = adapt(calibrated())
    assert isinstance(model, PeftModelForCausalLM)
    assert set(model.peft_config) == {"default", "corda_initial"}
    lora = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert isinstance(lora, Linear)
    assert lora.r == dict.fromkeys(model.peft_config, 4)
    assert lora.scaling == dict.fromkeys(model.peft_config, 1.0)
    assert torch.equal(lora.lora_A["default"].weight, lora.lora_A["corda_initial"].weight)
    assert torch.equal(lora.lora_B["default"].weight, -lora.lora_B["corda_initial"].weight)


@pytest.mark.parametrize(
    ("residual", "active"), [("pair", ["default", "corda_initial"]), ("weight", ["default"])]
)
def test_the_pair_is_active_where_the_base_is_whole(
    calibrated: Calibrated, adapt: Make, residual: str, active: list[str]
) -> None:
    model = adapt(calibrated(), residual=residual)
    for _ in range(2):
        assert model.active_adapters == model.base_model.active_adapters == active
        model.set_adapter("corda_initial")
        model.set_adapter("default")


def test_a_bare_decoder_is_adapted_too(calibrated: Calibrated, adapt: Make) -> None:
    model, covariances = calibrated()
    ids = torch.arange(3, 9)[None]
    before = model.model(input_ids=ids).last_hidden_state
    names = {name.removeprefix("model."): covariances[name] for name in covariances}
    adapted = adapt((model.model, type(covariances)(names)))
    assert not isinstance(adapted, PeftModelForCausalLM)
    torch.testing.assert_close(adapted(input_ids=ids).last_hidden_state, before)


ATTEMPTS: dict[str, Callable[[Any, Path], object]] = {
    "nothing": lambda model, _: None,
    "requires_grad_": lambda model, _: model.requires_grad_(True),
    "set_adapter": lambda model, _: model.set_adapter("default"),
    "set_adapter of the initial": lambda model, _: model.set_adapter("corda_initial"),
    "base_model.set_adapter": lambda model, _: model.base_model.set_adapter(
        ["default", "corda_initial"]
    ),
    "set_requires_grad": lambda model, _: model.set_requires_grad(["default", "corda_initial"]),
    "enable_adapter_layers": lambda model, _: model.base_model.enable_adapter_layers(),
    "disable_adapter": lambda model, _: model.disable_adapter().__enter__(),
    "load_adapter": lambda model, folder: model.load_adapter(
        folder / "corda_initial", "corda_initial", is_trainable=True
    ),
}


@pytest.mark.parametrize("residual", ["pair", "weight"])
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_makes_the_initial_factors_train(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    tmp_path: Path,
    attempt: str,
    residual: str,
) -> None:
    model = adapt(calibrated(), residual=residual)
    save_adapter(model, tmp_path)
    before = initial(model)
    assert len(before) == 2 * 14
    ATTEMPTS[attempt](model, tmp_path)
    assert not [name for name, _ in model.named_parameters() if "corda_initial" in name]
    model.base_model.enable_adapter_layers()
    train(model.requires_grad_(True), 1)
    after = initial(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not after.keys() - before.keys()
    save_adapter(model, tmp_path)


def test_only_a_and_b_are_trained(calibrated: Calibrated, adapt: Make, train: Make) -> None:
    model = adapt(calibrated())
    before = copy.deepcopy(model.state_dict())
    train(model)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert len(moved) == 2 * 14
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in moved)


def test_disabling_the_adapter_shows_the_base(
    calibrated: Calibrated, adapt: Make, train: Make, logits: Logits
) -> None:
    base, covariances = calibrated()
    model = train(adapt((copy.deepcopy(base), covariances)))
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), trained)
    assert not torch.allclose(trained, logits(base), atol=0.1)


def test_gradient_checkpointing_changes_nothing(calibrated: Calibrated, adapt: Make) -> None:
    ids = torch.randint(3, 64, (2, 8))
    gradients = []
    for checkpointing in (False, True):
        model = adapt(calibrated()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        gradients.append(torch.cat([grad.flatten() for grad in trained]))
    torch.testing.assert_close(*gradients)


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(3, 64, (40, 12), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = {
        "max_steps": 20,
        "save_steps": 10,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(arguments | options)),
        train_dataset=data,
        eval_dataset=data[:8],
    )


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("architecture", "residual", "step"),
    [("llama", "pair", None), ("llama", "weight", "lora"), ("gpt2", "pair", "lora")],
)
def test_a_resumed_training_goes_on_as_if_uninterrupted(
    calibrated: Calibrated,
    adapt: Make,
    logits: Logits,
    tmp_path: Path,
    architecture: str,
    residual: str,
    step: str | None,
) -> None:
    fresh, whole, cut = tmp_path / "fresh", tmp_path / "whole", tmp_path / "cut"
    model = adapt(calibrated(architecture), residual=residual, step=step)
    save_adapter(model, fresh)
    start, frozen = logits(model), initial(model)
    uninterrupted = trainer(model, whole)
    uninterrupted.train()
    assert len(losses(uninterrupted)) == 20
    assert not torch.allclose(logits(model), start, atol=0.1)

    shutil.copytree(whole / "checkpoint-10", cut / "checkpoint-10")
    again = load_for_training(calibrated(architecture)[0], fresh)
    resumed = trainer(again, cut)
    resumed.train(resume_from_checkpoint=True)

    assert again.active_adapters == model.active_adapters
    # The same sums in the same order: a tolerance only for other libraries.
    assert losses(resumed) == pytest.approx(losses(uninterrupted), rel=1e-5)
    torch.testing.assert_close(logits(again), logits(model))
    for state in (initial(model), initial(again)):
        assert all(torch.equal(state[name], frozen[name]) for name in frozen)
    for folder in (whole / "checkpoint-20", cut / "checkpoint-20"):
        loaded = load_for_training(calibrated(architecture)[0], folder)
        assert torch.equal(logits(loaded), logits(model if folder.parent == whole else again))


def test_the_best_checkpoint_is_loaded_at_the_end(
    calibrated: Calibrated, adapt: Make, logits: Logits, tmp_path: Path
) -> None:
    model = adapt(calibrated())
    run = trainer(
        model,
        tmp_path,
        max_steps=6,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # training lowers it: the first checkpoint is the best
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert model.active_adapters == ["default", "corda_initial"]
    best = load_for_training(calibrated()[0], run.state.best_model_checkpoint)
    assert torch.equal(logits(model), logits(best))


def test_a_strangers_peft_model_is_refused(calibrated: Calibrated) -> None:
    stranger = get_peft_model(calibrated()[0], LoraConfig(target_modules="all-linear"))
    with pytest.raises(AdapterError, match="not made by corda_kernels: load its folder with"):
        adapter_of_peft(stranger)
