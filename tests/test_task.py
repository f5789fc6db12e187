"""Starts that know the task, and components weighted on both sides, from text to PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from pairs import pairwise
from peft import PeftModel
from stages import one_stage
from torch import Tensor, nn

from corda_kernels import (
    CompactnessPenalty,
    CordaConfig,
    CovarianceSet,
    DriftPenalty,
    calibrate,
    export_lora,
    init_corda,
    load_for_training,
    save_adapter,
)
from corda_kernels.adapter import read_adapter, write_adapter
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import ConfigError, CordaError, CovarianceError
from corda_kernels.init import corda_adapter
from corda_kernels.linears import linear_weight
from corda_kernels.report.content import adapter_report
from corda_kernels.report.page import html_page
from corda_kernels.report.table import layer_table

RANK = 4


@pytest.fixture(scope="module")
def model(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", initializer_range=0.1).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts() -> tuple[list[Any], list[Any]]:
    """Of the task, with labels for its answers alone, and of the knowledge to keep."""
    generator = torch.Generator().manual_seed(2)
    task, knowledge = (torch.randint(3, 64, (6, 20), generator=generator) for _ in range(2))
    labels = task.masked_fill(torch.arange(20) < 8, -100)
    return [{"input_ids": task, "labels": labels}], [knowledge]


@pytest.fixture(scope="module")
def both(model: nn.Module, texts: tuple[list[Any], list[Any]]) -> tuple[Any, Any]:
    """Gradients of the task; covariances and gradients of the knowledge."""
    task, knowledge = texts
    options: dict[str, Any] = {"sides": "both", "progress": False}
    return (
        calibrate(model, task, **options),
        calibrate(model, knowledge, labels="sampled", **options),
    )


def config(mode: Any = "task", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"rank": RANK, "progress": False} | options))


def root(matrix: Tensor, power: float, damping: float = 0.01) -> Tensor:
    matrix = matrix.double()
    eye = torch.eye(len(matrix), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix + damping * matrix.diagonal().mean() * eye)
    return (vectors * values**power) @ vectors.T


@pytest.mark.parametrize("kept", [True, False])
def test_a_task_start_is_that_of_its_definition(
    model: nn.Module, texts: tuple[list[Any], list[Any]], both: tuple[Any, Any], kept: bool
) -> None:
    task, knowledge = texts
    found = corda_adapter(model, task, config(), keep=knowledge if kept else None)
    given = corda_adapter(model, both[0], config(), keep=both[1] if kept else None)
    assert found.layers.keys() == both[0].keys()
    for name, layer in found.layers.items():
        channels = layer.A.shape[1]
        S = torch.eye(channels, dtype=torch.float64)
        if kept:
            S = root(both[1][name].matrix, -0.5)
        V = torch.linalg.svd(both[0].gradients[name].mean.double() @ S).Vh[:RANK]
        rows = V @ S
        rows *= (3 * channels) ** -0.5 / rows.square().mean().sqrt()
        signs = (layer.A.double() * rows).sum(1, keepdim=True).sign()
        error = (signs * layer.A - rows).norm() / rows.norm()
        assert float(error) < 1e-4, name
        assert layer.B.shape == (len(layer.B), RANK)
        assert not layer.B.any()
        assert layer.scaling == 1.0
        again = given.layers[name].A
        torch.testing.assert_close(again, layer.A, rtol=1e-3, atol=1e-4)
    assert found.record.calibration.get("keep", {}).get("tokens") == (120 if kept else None)


def test_it_is_a_plain_lora_for_stock_tools(
    model: nn.Module,
    texts: tuple[list[Any], list[Any]],
    logits: Callable[[nn.Module], Tensor],
    tmp_path: Path,
) -> None:
    task, knowledge = texts
    base = copy.deepcopy(model)
    before = logits(base)
    adapted = init_corda(base, task, config(freeze_a=True), keep=knowledge)
    assert torch.equal(logits(adapted), before)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_B" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    A = {n: p.clone() for n, p in adapted.named_parameters() if "lora_A" in n}
    losses = []
    for _ in range(3):
        loss = adapted(**task[0]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    now = dict(adapted.named_parameters())
    assert all(torch.equal(now[name], rows) for name, rows in A.items())
    save_adapter(adapted, tmp_path / "out")
    expected = logits(adapted)
    stock = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    assert stock.peft_config["default"].r == stock.peft_config["default"].lora_alpha == RANK
    torch.testing.assert_close(logits(stock), expected)
    again = load_for_training(copy.deepcopy(model), tmp_path / "out")
    assert [n for n, p in again.named_parameters() if p.requires_grad] == trained
    assert "freeze" not in (tmp_path / "out" / "adapter_config.json").read_text()
    assert "Train B; A stays" in (tmp_path / "out" / "README.md").read_text()
    export_lora(tmp_path / "out", tmp_path / "exported")
    exported = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "exported")
    torch.testing.assert_close(logits(exported), expected)


def test_without_peft_it_is_the_same(
    model: nn.Module, both: tuple[Any, Any], tmp_path: Path
) -> None:
    adapted = init_corda(
        copy.deepcopy(model), both[0], config(freeze_a=True), use_peft=False, keep=both[1]
    )
    trained = {n.rpartition(".")[2] for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"B"}
    save_adapter(adapted, tmp_path)
    assert read_adapter(tmp_path).record.freeze_a


@pairwise(mode=["kpm", "ipm"], residual=[None, "weight"], damping=[0.01, 0.1])
def test_two_sided_components_are_those_of_their_definition(
    model: nn.Module, both: tuple[Any, Any], mode: str, residual: Any, damping: float
) -> None:
    knowledge = both[1]
    options = {"sides": "both", "residual": residual, "damping": damping}
    found = corda_adapter(model, knowledge, config(mode, **options))
    for name, layer in found.layers.items():
        W = linear_weight(model.get_submodule(name)).detach().double()
        C, D = knowledge[name].matrix, knowledge.gradients[name].matrix
        left, right = root(D, 0.5, damping), root(C, 0.5, damping)
        U, S, Vh = torch.linalg.svd(left @ W @ right, full_matrices=False)
        some = slice(RANK) if mode == "ipm" else slice(-RANK, None)
        B0, A0 = root(D, -0.5, damping) @ U[:, some], Vh[some] @ root(C, -0.5, damping)
        note = found.record.layers[name]
        assert note.sigma_max == pytest.approx(float(S[some][0]), rel=1e-5)
        if residual is None:
            P, rows = layer.B[:, :RANK].double(), layer.A[RANK:].double()
        else:
            P, rows = layer.B.double(), layer.A.double()
        for ours, exact in ((P.T, B0.T), (rows, A0)):
            ours, exact = (x / x.norm(dim=1, keepdim=True) for x in (ours, exact))
            assert float((ours * exact).sum(1).abs().min()) > 1 - 1e-4, name
        if residual is not None:
            part = B0 * S[some] @ A0
            product = layer.product().double()
            assert float((product - part).norm() / part.norm()) < 1e-4


def test_the_penalty_weights_outputs(model: nn.Module, both: tuple[Any, Any]) -> None:
    adapted = init_corda(copy.deepcopy(model), both[0], config(), keep=both[1]).double()
    torch.manual_seed(3)
    expected, ratios = 0.0, []
    for name, part in both[1].items():
        lora: Any = adapted.get_base_model().get_submodule(name)
        B, A = (factors["default"].weight for factors in (lora.lora_B, lora.lora_A))
        B.data = torch.randn_like(B)
        change = (B @ A).detach()
        D, C = both[1].gradients[name].matrix.double(), part.matrix.double()
        ratio = both[1].gradients[name].fisher_trace.double() / (D.trace() * C.trace())
        ratios.append(float(ratio))
        expected += float(ratio * (D @ change @ C @ change.T).trace())
    assert max(ratios) > 1.1 * min(ratios)
    penalty = DriftPenalty(adapted, both[1], sides="both")
    value = penalty()
    assert float(value.detach()) == pytest.approx(expected, rel=1e-8)
    value.backward()
    plain = float(DriftPenalty(adapted, both[1])().detach())
    assert plain != pytest.approx(expected, rel=0.1)
    with pytest.raises(CovarianceError, match=r"no gradient for the adapted layer model\."):
        DriftPenalty(adapted, CovarianceSet(both[1]), sides="both")


def part(covariances: CovarianceSet, block: int) -> CovarianceSet:
    """The layers of one block, with all others left out on purpose."""
    names = [name for name in covariances if f".{block}." in name]
    return CovarianceSet(
        {name: covariances[name] for name in names},
        left_out={name: "on purpose" for name in covariances if name not in names},
        provenance=covariances.provenance,
        gradients={name: covariances.gradients[name] for name in names},
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "budget": ({"budget": "r=4"}, "give a rank instead"),
    "hold": ({"hold": 8}, "hold at 1"),
    "residual": ({"residual": "weight"}, "residual at None"),
    "labels": ({"labels": "sampled"}, "is only noise"),
    "stability": ({"stability": True}, "leave stability off"),
    "candidates": ({"candidates": 2}, "leave candidates at 1"),
    "experts": ({"experts": "shared"}, 'give experts="each"'),
    "frozen": ({"mode": "kpm", "freeze_a": True}, 'freeze_a is for mode "task"'),
    "two sides, budget": ({"mode": "ipm", "sides": "both", "budget": "r=4"}, "give a rank"),
    "sides": ({"sides": "outputs", "mode": "kpm"}, "sides"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together_are_refused(name: str) -> None:
    options, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        config(**options)


def test_what_does_not_go_is_refused_before_the_work(
    model: nn.Module,
    texts: tuple[list[Any], list[Any]],
    both: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, knowledge = texts
    monkeypatch.setattr(type(model), "forward", None)  # nothing runs
    plain = CovarianceSet(both[1])
    cases: list[tuple[Any, Any, Any, type[CordaError], str]] = [
        (plain, config(), None, CovarianceError, r"no gradient for layer model\..*labels=.given"),
        (plain, config("kpm", sides="both"), None, CovarianceError, "labels=.sampled"),
        (both[1], config(), None, CovarianceError, "sampled labels, but.*given"),
        (both[0], config("kpm", sides="both"), None, CovarianceError, "given labels, but.*sampled"),
        (task, config("kpm"), knowledge, ConfigError, "leave keep out"),
        (task, config(), CovarianceSet({}), CovarianceError, "no covariance for layer .* in keep"),
        (CovarianceSet({}), config(), both[1], CovarianceError, "no covariance for .* in data"),
        (part(both[0], 0), config(), part(both[1], 1), CovarianceError, "no layer in common"),
    ]
    for data, chosen, keep, error, says in cases:
        with pytest.raises(error, match=says):
            corda_adapter(model, data, chosen, keep=keep)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"covariances and gradients of one decoder block take"):
        corda_adapter(model, task, config(memory_limit=1))
    own, steep = covariance_bytes(model)[0], covariance_bytes(model, sides="both")[1]
    never = (pytest.fail("the model ran") for _ in range(1))
    for data, needed in ((never, own + steep), (both[0], own)):
        with pytest.raises(
            ConfigError, match=f"text to keep .* raise the memory limit to {needed} "
        ):
            corda_adapter(model, data, config(memory_limit=needed - 1), keep=knowledge)
    corda_adapter(model, both[0], config(memory_limit=own), keep=knowledge)


def test_the_text_to_keep_is_read_first(
    model: nn.Module, texts: tuple[list[Any], list[Any]]
) -> None:
    never = (pytest.fail("the model ran") for _ in range(1))
    with pytest.raises(CordaError, match="token"):
        corda_adapter(model, never, config(), keep=[torch.full((1, 4), 10**6)])


def test_the_stability_of_another_product_is_not_that_of_an_adapter(
    model: nn.Module, texts: tuple[list[Any], list[Any]]
) -> None:
    batches = list(texts[0][0]["input_ids"].split(3))
    covariances = one_stage(model, batches, rank=RANK, sides="both")
    assert covariances.provenance["stability"]["layers"]
    assert corda_adapter(model, covariances, config()).record.stability == {}
    two_sided = config("kpm", sides="both", labels="given")
    assert corda_adapter(model, covariances, two_sided).record.stability == {}
    assert corda_adapter(model, covariances, config("kpm")).record.stability


@pytest.mark.parametrize("mode", ["task", "kpm"])
def test_block_by_block_it_is_the_same(
    model: nn.Module, texts: tuple[list[Any], list[Any]], both: tuple[Any, Any], mode: str
) -> None:
    task, knowledge = texts
    own, largest = covariance_bytes(model)[0], covariance_bytes(model, sides="both")[1]
    whole = config(mode, sides="both")
    keeps = [knowledge, both[1]] if mode == "task" else [None]
    expected = corda_adapter(model, task, whole, keep=keeps[0])
    for keep in keeps:
        limit = largest + (own if isinstance(keep, list) else 0)
        limited = config(mode, sides="both", memory_limit=limit)
        found = corda_adapter(model, task, limited, keep=keep)
        assert list(found.layers) == list(expected.layers)
        ours, theirs = found.record.measured, expected.record.measured
        assert [note["layers"] for note in ours["inputs"]] == [
            note["layers"] for note in theirs["inputs"]
        ]
        assert list(ours["layers"]) == list(theirs["layers"])
        for name, layer in expected.layers.items():
            one, other = (each.change().A for each in (layer, found.layers[name]))
            signs = (one * other).sum(1, keepdim=True).sign()
            assert (signs * other - one).norm() < 1e-3 * one.norm(), name


def test_a_folder_keeps_what_a_report_shows(
    model: nn.Module, both: tuple[Any, Any], tmp_path: Path
) -> None:
    write_adapter(corda_adapter(model, both[0], config(), keep=both[1]), tmp_path / "task")
    two_sided = config("kpm", sides="both", labels="given")
    write_adapter(corda_adapter(model, both[0], two_sided), tmp_path / "kpm")
    expected = {
        "task": ("the steepest directions of the task's gradient", "Ḡ·C^-½"),
        "kpm": ("the smallest components of D^½·W·C^½", "D^½·W·C^½"),
    }
    for mode, (trains, product) in expected.items():
        report = adapter_report("out", read_adapter(tmp_path / mode))
        assert report.mode == mode
        assert dict(report.summary)["trains"] == trains
        notes = " ".join(layer_table(report).notes)
        assert f"largest singular value of {product} trained" in notes
    if find_spec("matplotlib"):
        page = html_page(report)
        assert "was made of another one: D^½·W·C^½" in page
        assert "make the adapter again" not in page


def test_compactness_of_two_sided_components_is_refused(
    model: nn.Module, both: tuple[Any, Any]
) -> None:
    chosen = config("kpm", sides="both", residual="weight")
    adapted = init_corda(copy.deepcopy(model), both[1], chosen)
    with pytest.raises(ConfigError, match=r"holds components of D\^½·W·C\^½: make it with sides"):
        CompactnessPenalty(adapted, both[1])
