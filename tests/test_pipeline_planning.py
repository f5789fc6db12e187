"""Ranks under a budget and covariances from candidates, through the pipeline and out of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from kinds import Calibrated, Logits, Make
from pairs import pairs
from peft import PeftModel
from stages import one_stage
from torch import Tensor, nn

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    export_lora,
    init_corda,
    load_for_training,
    merge,
    save_adapter,
)
from corda_kernels.adapter import adapter_of, read_adapter
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import (
    BatchError,
    ConfigError,
    LeftOutWarning,
    NonFiniteActivationError,
    RankError,
)
from corda_kernels.init import corda_adapter
from corda_kernels.init import covariances as covariances_of_text
from corda_kernels.linears import linear_weight
from corda_kernels.planning import Selection, allocate_ranks, layer_spectra

pytestmark = pytest.mark.slow

BUDGET = 3000  # of tiny layers, 96 to 320 parameters a component


def config(mode: Any = "kpm", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"budget": BUDGET, "stability": True, "progress": False} | options))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def components(adapter: Any) -> dict[str, int]:
    """How many components each layer has: half the rows of its LoRA, or all of a published A."""
    return {
        name: layer.rank // (2 if layer.initial is None else 1)
        for name, layer in adapter.layers.items()
    }


@pytest.mark.parametrize(
    ("residual", "mode", "damping", "condition"),
    pairs([None, "weight"], ["kpm", "ipm"], [0.01, 0.1, None], ["ratio", "tight"]),
)
def test_the_ranks_are_those_of_the_damped_layers(
    calibrated: Calibrated,
    residual: Any,
    mode: Any,
    damping: float | None,
    condition: Any,
) -> None:
    model, covariances = calibrated()
    rows = 1 if residual else 2
    budget = BUDGET // 2 * rows
    options = config(mode, damping=damping, condition=condition, residual=residual, budget=budget)
    adapter = corda_adapter(model, covariances, options)
    modules = {name: model.get_submodule(name) for name in covariances}
    spectra = layer_spectra(modules, covariances, damping=damping or 0.01, condition=condition)
    shapes = {name: tuple(linear_weight(module).shape) for name, module in modules.items()}
    expected = allocate_ranks(
        {name: spectrum.singular_values for name, spectrum in spectra.items()},
        {name: spectrum.log_condition for name, spectrum in spectra.items()},
        shapes,
        budget=budget,
        mode=mode,
        rows=rows,
    )
    record = adapter.record
    assert record.allocation["ranks"] == expected
    assert components(adapter) == {name: rank for name, rank in expected.items() if rank}
    assert record.rank == max(expected.values())
    spent = sum(layer.A.numel() + layer.B.numel() for layer in adapter.layers.values())
    assert record.allocation["spent"] == spent <= record.allocation["budget"] == budget
    assert budget - spent < rows * 80  # the widest layer's component
    for name, layer in adapter.layers.items():
        assert record.layers[name].rank * rows == layer.rank


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("form", [{}, {"hold": 8}, {"residual": "weight"}], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_layers_of_different_rank_go_all_the_way(
    calibrated: Calibrated,
    train: Make,
    logits: Logits,
    same_logits: Callable[..., bool],
    tmp_path: Path,
    architecture: str,
    mode: str,
    form: dict[str, Any],
    use_peft: bool,
) -> None:
    model, covariances = calibrated(architecture)
    untouched = copy.deepcopy(model)
    budget = BUDGET // 2 if "residual" in form else BUDGET
    options = config(mode, budget=budget, **form)
    adapted = init_corda(model, covariances, options, use_peft=use_peft)
    assert same_logits(logits(adapted), untouched)
    ranks = list(components(adapter_of(adapted)).values())
    assert len(set(ranks)) > 1
    # The last component of a layer is filtered after all others: IPM leaves one everywhere.
    assert (len(ranks) < len(covariances)) == (mode == "kpm")
    assert parameters(adapted) <= budget

    save_adapter(train(adapted), tmp_path / "adapter")
    trained = logits(adapted)
    loaded = load_for_training(copy.deepcopy(untouched), tmp_path / "adapter", use_peft=use_peft)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    assert parameters(loaded) == parameters(adapted)

    export_lora(tmp_path / "adapter", tmp_path / "lora")
    stock = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "lora")
    torch.testing.assert_close(logits(stock), trained, rtol=1e-4, atol=1e-4)
    assert stock.peft_config["default"].r == 2 * max(ranks)
    merged = merge(loaded)
    assert not any("lora" in name or ".A" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)


def test_stock_peft_reads_rank_and_alpha_by_layer(
    calibrated: Calibrated, train: Make, logits: Logits, tmp_path: Path
) -> None:
    model, covariances = calibrated()
    adapted = init_corda(model, covariances, config(hold=8))
    save_adapter(train(adapted), tmp_path)
    adapter = read_adapter(tmp_path)
    assert len(set(components(adapter).values())) > 1
    base, _ = calibrated()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    stock = loaded.get_base_model()
    for name in covariances:
        module = stock.get_submodule(name)
        if name not in adapter.layers:
            assert not hasattr(module, "lora_A")
            continue
        layer = adapter.layers[name]
        assert module.r["default"] == layer.rank
        assert module.scaling["default"] == layer.scaling == 1 / 8
        assert torch.equal(module.lora_A["default"].weight, layer.A)


@pytest.mark.parametrize(
    ("budget", "of"), [("r=4", "layers"), ("5%", "model"), (0.05, "model"), (777, "number")]
)
@pytest.mark.parametrize(("residual", "rows"), [(None, 2), ("weight", 1)])
def test_budgets_are_read_for_the_model(
    calibrated: Calibrated, residual: Any, rows: int, budget: Any, of: str
) -> None:
    model, covariances = calibrated()
    meant = {
        "layers": sum(
            rows * 4 * sum(model.get_submodule(name).weight.shape) for name in covariances
        ),
        "model": int(sum(p.numel() for p in model.parameters()) / 20),
        "number": 777,
    }[of]
    options = config(budget=budget, residual=residual)
    allocation = corda_adapter(model, covariances, options).record.allocation
    assert allocation["budget"] == meant
    assert allocation["spent"] <= meant


def test_bounds_reach_the_allocation(calibrated: Calibrated) -> None:
    options = config("ipm", min_rank=2, max_rank=4, rank_multiple=2, budget=6000)
    ranks = components(corda_adapter(*calibrated(), options))
    assert len(ranks) == 14
    assert set(ranks.values()) == {2, 4}


def test_a_budget_for_nothing_is_refused(calibrated: Calibrated) -> None:
    never = (pytest.fail("the model ran") for _ in range(1))
    for options in ({"budget": 95}, {"budget": 47, "residual": "weight"}, {"budget": "0.1%"}):
        with pytest.raises(RankError, match=r"pays for nothing: 1 component.*k_proj.* take"):
            corda_adapter(calibrated()[0], never, config(**options))
    with pytest.raises(RankError, match=r"rank_multiple 64 is more than any .* have, at most 32"):
        corda_adapter(calibrated()[0], never, config(rank_multiple=64))
    # A component of every layer takes two rows of Σ(out + in) = 928.
    with pytest.raises(RankError, match="min_rank 1 needs 1856 adapter parameters over 14 layers"):
        corda_adapter(*calibrated(), config(budget=1855, min_rank=1))
    corda_adapter(*calibrated(), config(budget=1856, min_rank=1))
    with pytest.raises(ConfigError, match="is not a budget"):
        corda_adapter(calibrated()[0], never, config(budget="lots"))


def test_a_budget_below_the_first_layer_in_line_names_its_price(calibrated: Calibrated) -> None:
    model, covariances = calibrated()
    with pytest.raises(RankError, match=r"layer \S+ comes first .* 2 component") as caught:
        corda_adapter(model, covariances, config("ipm", budget=192, rank_multiple=2))
    price = int(str(caught.value).partition("takes ")[2].partition(" ")[0])
    assert price > 192
    first = corda_adapter(model, covariances, config("ipm", budget=price, rank_multiple=2))
    assert list(components(first).values()) == [2]
    assert str(caught.value).partition("layer ")[2].startswith(f"{min(first.layers)} ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": None, "max_rank": 4}, "bound the ranks under a budget"),
        ({"budget": None, "min_rank": 1}, "bound the ranks under a budget"),
        ({"budget": None, "rank_multiple": 8}, "bound the ranks under a budget"),
        ({"candidates": 0}, "candidates must be a whole number of at least 1"),
        ({"selection": "best"}, 'selection must be "argmin" or "pool"'),
        ({"condition": "other"}, 'condition must be "ratio"'),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**options)


def batches(count: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (3, 16), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("selection", ["argmin", "pool"])
def test_candidates_are_dealt_out_in_turn(calibrated: Calibrated, selection: Any) -> None:
    model, _ = calibrated()
    options = config(budget=None, rank=4, candidates=3, selection=selection)
    record = corda_adapter(model, iter(batches()), options).record
    report = Selection.from_json(record.calibration["selection"])
    assert report.tokens == [3 * 48, 2 * 48, 2 * 48]
    assert report.domains == ["the given batches"] * 3
    assert (report.method, report.damping) == (selection, 0.01)
    assert record.stability == {}
    tokens = {layer.tokens for layer in record.layers.values()}
    assert tokens == {7 * 48} if selection == "pool" else tokens <= {3 * 48, 2 * 48}


def same_adapters(found: Any, expected: Any, same_components: Callable[..., bool]) -> None:
    """Whether two adapters have the same components, and were made of the same text."""
    assert list(found.layers) == list(expected.layers)
    for name, layer in found.layers.items():
        assert same_components(layer, expected.layers[name]), name
    assert found.record.allocation == expected.record.allocation
    scores, others = (
        Selection.from_json(adapter.record.calibration.pop("selection"))
        if "selection" in adapter.record.calibration
        else None
        for adapter in (found, expected)
    )
    assert found.record.calibration == expected.record.calibration
    assert (scores is None) == (others is None)
    if scores is not None and others is not None:
        assert scores.winners() == others.winners()
        assert (scores.tokens, scores.domains) == (others.tokens, others.domains)
        assert scores.groups == others.groups
        for name, row in scores.scores.items():
            assert row == pytest.approx(others.scores[name], rel=1e-4)


def covariance_size(covariances: CovarianceSet) -> int:
    return sum(4 * covariance.matrix.numel() for covariance, _ in covariances.groups())


@pytest.mark.parametrize("selection", ["argmin", "pool"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_candidates_are_selected_block_by_block_too(
    calibrated: Calibrated,
    same_components: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    selection: Any,
) -> None:
    model, covariances = calibrated(architecture)
    options = {"budget": None, "rank": 4, "candidates": 3, "selection": selection}
    text = [batch.repeat(4, 1) for batch in batches()]
    # What is kept, and one candidate.
    limit = 2 * covariance_size(covariances)
    whole = corda_adapter(model, text, config(**options, memory_limit=limit), domain="text")
    monkeypatch.setattr(covariances_of_text, "calibrate", None)
    found = corda_adapter(model, text, config(**options, memory_limit=limit - 1), domain="text")
    same_adapters(found, whole, same_components)


@pytest.mark.parametrize(
    ("options", "sets"),
    [({}, 3), ({"stability": False}, 1), ({"candidates": 3}, 2)],
    ids=["halves", "whole", "candidates"],
)
def test_a_budget_is_shared_out_in_one_pass_or_not_at_all(
    calibrated: Calibrated,
    same_components: Callable[..., bool],
    options: dict[str, Any],
    sets: int,
) -> None:
    model, covariances = calibrated()
    limit = sets * covariance_size(covariances)
    given = batches() if "candidates" in options else [*batches(), *batches()]
    expected = corda_adapter(model, given, config(**options))
    found = corda_adapter(model, given, config(**options, memory_limit=limit))
    same_adapters(found, expected, same_components)
    with pytest.raises(ConfigError, match=f"raise the memory limit to {limit} bytes"):
        corda_adapter(model, given, config(**options, memory_limit=limit - 1))


@pytest.mark.parametrize("options", [{}, {"candidates": 2}, {"candidates": 2, "memory_limit": ...}])
def test_offloaded_layers_are_scored_and_decomposed(
    calibrated: Calibrated,
    same_components: Callable[..., bool],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    model, _ = calibrated()
    if "memory_limit" in options:  # so that two candidates of one block fit, and no more
        blockwise = {"budget": None, "rank": 4, "memory_limit": 2 * covariance_bytes(model)[1]}
        options = options | blockwise
    choices = config(**options)
    text = [batch.repeat(4, 1) for batch in batches()]
    expected = corda_adapter(model, text, choices)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    same_adapters(corda_adapter(model, text, choices), expected, same_components)


@pytest.mark.parametrize("count", [2, 12])
def test_candidates_are_resumed_from_the_one_that_was_cut_off(
    calibrated: Calibrated, tmp_path: Path, count: int
) -> None:
    model, _ = calibrated()
    given = [*batches(), *batches()]
    expected = one_stage(model, given, candidates=count, progress=False)
    kept = CalibrationCheckpoint(tmp_path / "run", every=1, resume=True)
    broken = [*given]
    broken[count - 1] = broken[count - 1].new_full((3, 16), 10**6)  # there is no such token
    with pytest.raises(BatchError, match=f"batch {count - 1} .counted from 0. holds token 1000000"):
        one_stage(model, broken, candidates=count, checkpoint=kept, progress=False)
    assert {file.name for file in kept.kept()} == {f"run-{i + 1}" for i in range(count - 1)}
    rows: list[int] = []
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found = one_stage(model, given, candidates=count, checkpoint=kept, progress=False)
    handle.remove()
    assert sum(rows) == sum(len(batch) for batch in given[count - 1 :: count])
    assert all(torch.equal(found[name].matrix, expected[name].matrix) for name in expected)
    assert found.provenance == expected.provenance
    (tmp_path / "run-5-other").touch()
    kept.discard()
    assert [file.name for file in tmp_path.iterdir()] == ["run-5-other"]


def test_too_few_batches_for_the_candidates(calibrated: Calibrated) -> None:
    with pytest.raises(ConfigError, match="8 candidates need as many batches, got 7"):
        one_stage(calibrated()[0], batches(), candidates=8, progress=False)


def test_candidates_warn_once_and_name_the_batch_that_breaks(calibrated: Calibrated) -> None:
    model, _ = calibrated("mixtral")
    with pytest.warns(LeftOutWarning) as warned:
        one_stage(model, batches(), candidates=3, progress=False)
    assert len(warned) == 1

    model, _ = calibrated()
    model.get_input_embeddings().weight.data[5] = math.nan
    clean = [batch.masked_fill(batch == 5, 6) for batch in batches()]
    clean[5][0, 0] = 5
    with pytest.raises(NonFiniteActivationError) as caught:
        one_stage(model, clean, candidates=3, progress=False)
    assert (caught.value.batch, caught.value.tokens) == (5, (5 * 48, 6 * 48))
