from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Calibrated, Logits, Make
from peft import PeftModelForCausalLM
from torch import nn

from corda_kernels import load_for_training, save_adapter
from corda_kernels.adapter import adapter_of

BUDGET = {"budget": "r=4", "max_rank": 6}
# PEFT looks for the base to see whether its embeddings have another size.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Could not find a config file in residual of:UserWarning"),
]


@pytest.mark.parametrize("hold", [1, 8])
def test_the_model_is_stock_pefts_with_one_lora_of_twice_the_rank(
    calibrated: Calibrated, adapt: Make, hold: float
) -> None:
    from peft.tuners.lora import Linear

    model = adapt(calibrated(), hold=hold)
    assert type(model) is PeftModelForCausalLM
    assert {
        type(module) for module in model.modules() if "corda" in type(module).__module__
    } == set()
    assert list(model.peft_config) == model.active_adapters == ["default"]
    lora = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert type(lora) is Linear
    assert lora.r == {"default": 8}
    assert lora.scaling == {"default": 1 / hold}
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    assert not bool(A[:4].any())
    assert not bool(B[:, 4:].any())
    assert bool((A[4:] != 0).any(1).all() & (B[:, :4] != 0).any(0).all())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 8 / hold)
    assert config.rank_pattern == config.alpha_pattern == {}
    assert config.base_model_name_or_path == calibrated()[0].name_or_path


@pytest.mark.filterwarnings("error::FutureWarning")
def test_names_that_peft_uses_and_transformers_deprecates_raise_no_warning(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated())
    save_adapter(model, tmp_path)
    load_for_training(calibrated()[0], tmp_path)


@pytest.mark.parametrize("hold", [1, 8])
def test_under_a_budget_patterns_keep_one_scaling_everywhere(
    calibrated: Calibrated, adapt: Make, hold: float
) -> None:
    model = adapt(calibrated(), hold=hold, **BUDGET)
    layers = adapter_of(model).layers
    ranks = {name: layer.rank for name, layer in layers.items()}
    assert len(set(ranks.values())) > 1
    assert ranks == {name: 2 * entry.rank for name, entry in model.corda_record.layers.items()}
    for name, rank in ranks.items():
        lora = model.get_base_model().get_submodule(name)
        assert lora.r["default"] == rank
        assert lora.scaling["default"] == pytest.approx(1 / hold, rel=1e-15)
    config = model.peft_config["default"]
    assert config.r == max(ranks.values())
    assert config.rank_pattern.keys() == {name for name, rank in ranks.items() if rank != config.r}
    assert config.alpha_pattern.keys() == config.rank_pattern.keys()


def test_a_bare_decoder_is_adapted_too(calibrated: Calibrated, adapt: Make) -> None:
    model, covariances = calibrated()
    ids = torch.arange(3, 9)[None]
    before = model.model(input_ids=ids).last_hidden_state
    names = {name.removeprefix("model."): covariances[name] for name in covariances}
    adapted = adapt((model.model, type(covariances)(names)))
    assert not isinstance(adapted, PeftModelForCausalLM)
    assert torch.equal(adapted(input_ids=ids).last_hidden_state, before)


def test_all_of_the_lora_is_trained_and_nothing_else(
    calibrated: Calibrated, adapt: Make, train: Make
) -> None:
    model = adapt(calibrated())
    before = copy.deepcopy(model.state_dict())
    halves = {n: (f.A.clone(), f.B.clone()) for n, f in adapter_of(model).layers.items()}
    train(model)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert len(moved) == 2 * 14
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in moved)
    for name, layer in adapter_of(model).layers.items():
        A, B = halves[name]
        for now, start in ((layer.A, A), (layer.B.mT, B.mT)):
            assert bool((now != start).any(1).all())


def test_p_and_s_have_no_gradient_until_r_and_q_have_moved(
    calibrated: Calibrated, adapt: Make
) -> None:
    ids = torch.randint(3, 64, (2, 8))
    model = adapt(calibrated()).train()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rows = parameter.grad if "lora_A" in name else parameter.grad.mT.flip(0)
            assert bool((rows[:4] != 0).any(1).all()), name
            assert not bool(rows[4:].any()), name


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


def test_a_second_adapter_beside_it_stays_as_it_is(
    calibrated: Calibrated, adapt: Make, train: Make, logits: Logits, tmp_path: Path
) -> None:
    model = train(adapt(calibrated()))
    trained = logits(model)
    save_adapter(model, tmp_path)
    model.load_adapter(tmp_path, "reference")
    model.set_adapter("reference")
    assert torch.equal(logits(model), trained)
    model.set_adapter("default")
    assert not torch.allclose(logits(train(model)), trained, atol=0.1)
    model.set_adapter("reference")
    assert torch.equal(logits(model), trained)
    model.set_adapter("default")
    save_adapter(model, tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "corda.json",
        "README.md",
    }


@pytest.mark.parametrize("residual", [None, "weight"])
def test_a_copy_is_an_adapted_model_of_its_own(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    residual: str | None,
) -> None:
    model = train(adapt(calibrated(), residual=residual))
    trained = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), trained)
    save_adapter(train(other), tmp_path)
    assert not torch.allclose(logits(other), trained, atol=0.1)
    assert torch.equal(logits(load_for_training(calibrated()[0], tmp_path)), logits(other))
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_an_untrained_adapter_again_and_again_leaves_the_base(
    calibrated: Calibrated, adapt: Make, dtype: torch.dtype
) -> None:
    model, covariances = calibrated()
    model = adapt((model.to(dtype), covariances))
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    untouched = calibrated()[0].to(dtype)
    for name in covariances:
        weight = model.get_base_model().get_submodule(name).get_base_layer().weight
        assert torch.equal(weight, untouched.get_submodule(name).weight)


def test_options_of_loraconfig_are_passed_on(calibrated: Calibrated, adapt: Make) -> None:
    model = adapt(calibrated(), lora_dropout=0.25, modules_to_save=["lm_head"])
    config = model.peft_config["default"]
    assert (config.lora_dropout, config.modules_to_save) == (0.25, ["lm_head"])
    lora = model.get_base_model().model.layers[0].mlp.down_proj
    assert lora.lora_dropout["default"].p == 0.25
    whole = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert whole.requires_grad
    assert torch.equal(whole, calibrated()[0].lm_head.weight)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}]
)
def test_the_start_is_the_base_with_any_of_these_options(
    calibrated: Calibrated, adapt: Make, logits: Logits, options: dict[str, Any]
) -> None:
    model = adapt(calibrated(), **options)
    expected = logits(calibrated()[0])
    if options.get("use_dora"):  # it divides by the norms of W that it multiplies by
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        assert "default" in layer.lora_variant
        assert layer.lora_magnitude_vector["default"].weight.requires_grad
    else:
        assert torch.equal(logits(model), expected)


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
        "max_steps": 12,
        "save_steps": 6,
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
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"residual": "weight"}),
        ("llama", {"hold": 8, "lora_dropout": 0.1} | BUDGET),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"use_dora": True}),
        ("gpt2", {"hold": 8}),
    ],
)
def test_a_resumed_training_goes_on_as_if_uninterrupted(
    calibrated: Calibrated,
    adapt: Make,
    logits: Logits,
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
) -> None:
    fresh, whole, cut = tmp_path / "fresh", tmp_path / "whole", tmp_path / "cut"
    model = adapt(calibrated(architecture), **options)
    save_adapter(model, fresh)
    start = logits(model)
    uninterrupted = trainer(model, whole)
    uninterrupted.train()
    assert len(losses(uninterrupted)) == 12
    assert not torch.allclose(logits(model), start, atol=0.1)

    shutil.copytree(whole / "checkpoint-6", cut / "checkpoint-6")
    again = load_for_training(calibrated(architecture)[0], fresh)
    resumed = trainer(again, cut)
    resumed.train(resume_from_checkpoint=True)

    assert again.active_adapters == model.active_adapters == ["default"]
    # The same sums in the same order: a tolerance only for other libraries.
    assert losses(resumed) == pytest.approx(losses(uninterrupted), rel=1e-5)
    torch.testing.assert_close(logits(again), logits(model))
    for folder in (whole / "checkpoint-12", cut / "checkpoint-12"):
        if "residual" in options:  # what a trainer does not save
            shutil.copy(fresh / "corda_initial.safetensors", folder)
        loaded = load_for_training(calibrated(architecture)[0], folder)
        assert torch.equal(logits(loaded), logits(model if folder.parent == whole else again))


@pytest.mark.parametrize("residual", [None, "weight"])
def test_the_best_checkpoint_is_loaded_at_the_end(
    calibrated: Calibrated, adapt: Make, logits: Logits, tmp_path: Path, residual: str | None
) -> None:
    model = adapt(calibrated(), residual=residual)
    save_adapter(model, tmp_path / "fresh")
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
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert model.active_adapters == ["default"]
    if residual is not None:
        shutil.copy(tmp_path / "fresh" / "corda_initial.safetensors", best)
    assert torch.equal(logits(model), logits(load_for_training(calibrated()[0], best)))


def test_two_trained_adapters_are_combined_by_concatenation(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path
) -> None:
    first, second = train(adapt(calibrated())), train(adapt(calibrated(), mode="kpm", hold=8))
    changes = [
        {name: layer.change().product() for name, layer in adapter_of(model).layers.items()}
        for model in (first, second)
    ]
    save_adapter(second, tmp_path)
    first.load_adapter(tmp_path, "second")
    first.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", combination_type="cat")
    for name in changes[0]:
        found = first.get_base_model().get_submodule(name).get_delta_weight("both")
        expected = 0.5 * changes[0][name] + 2.0 * changes[1][name]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
