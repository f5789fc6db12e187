from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pipeline
import pytest
import torch
from pipeline import STAGES, PipelineRow, bench_pipeline, by_stage
from pipeline_methods import METHODS, Stages, Subject, Task
from ranks import CONTEXT
from torch import nn
from transformers import PreTrainedModel

from corda_kernels import CordaConfig, init_corda, load_model
from corda_kernels.errors import CordaError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def task(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Task:
    tiny_model("llama", initializer_range=0.1).save_pretrained(tmp_path / "model")
    batches = list(torch.randint(3, 64, (6, 1, 24)))
    return Task(str(tmp_path / "model"), batches, "ipm", 4, CPU)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants run in this process: starting others takes seconds."""
    monkeypatch.setattr(pipeline, "_in_child", pipeline.run)


@pytest.mark.usefixtures("_here")
def test_contestants_compute_the_same(task: Task) -> None:
    rows = {row.name: row for row in bench_pipeline(task)}
    assert list(rows) == ["peft", "patch_peft", "init_corda", "pissa", "eva"]
    for row in rows.values():
        assert row.seconds > 0
        assert sum(row.stages.values()) == pytest.approx(row.seconds)
        assert row.stages.get("forward", 0) == row.forward
    for name in ("peft", "patch_peft", "init_corda"):
        assert list(rows[name].stages) == list(STAGES)
    assert list(rows["pissa"].stages) == ["decomposition", "attaching"]
    assert list(rows["eva"].stages) == ["forward", "decomposition", "attaching"]
    compared = {name: row for name, row in rows.items() if row.overlap is not None}
    assert list(compared) == ["patch_peft"]
    for row in compared.values():
        assert row.overlap == pytest.approx(1, abs=1e-4)
        assert row.passed


@pytest.mark.usefixtures("_here")
def test_the_bare_pass_is_that_of_the_whole_model_sequence_by_sequence(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each contestant's own passes beside it: those that make no logits, in their own batches."""
    ran: list[tuple[str, int]] = []
    timed: list[list[tuple[str, int]]] = []

    def noted(self: nn.Module, *args: object, input_ids: torch.Tensor, **kwargs: object) -> object:
        ran.append((type(self).__name__, len(input_ids)))
        return call(self, *args, input_ids=input_ids, **kwargs)

    def clock(call: Callable[[], object], device: torch.device) -> float:
        ran.clear()
        call()
        timed.append(list(ran))
        return float(len(timed))

    call = PreTrainedModel.__call__
    monkeypatch.setattr(PreTrainedModel, "__call__", noted)
    monkeypatch.setattr(pipeline, "_timed", clock)
    whole = [entry for _ in range(6) for entry in (("LlamaForCausalLM", 1), ("LlamaModel", 1))]
    own = {"init_corda": [("LlamaModel", 3)] * 2}
    for name in ("peft", "patch_peft", "init_corda"):
        timed.clear()
        (row,) = bench_pipeline(task, (name,))
        assert timed == [whole, *([own[name]] if name in own else [])]
        assert (row.bare, row.forward) == (1, len(timed))
        assert row.beyond == row.seconds - row.bare


def test_rounds_are_in_turn_and_the_middle_run_is_shown(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = iter([9.0, 5.0, 7.0, 4.0, 8.0, 6.0])
    bare = iter([2.0, 0.75, 1.0, 0.5, 3.0, 0.25])
    order = []

    def child(name: str, task: Task, folder: Path) -> PipelineRow:
        order.append(name)
        assert not (folder / f"{name}.pt").exists()  # which would spare it the work
        torch.save({}, folder / f"{name}.pt")
        seconds = next(spent)
        return PipelineRow(name, seconds, 1.0, next(bare), int(100 / seconds), passed=seconds < 9)

    monkeypatch.setattr(pipeline, "_in_child", child)
    task = replace(task, mode="kpm")
    theirs, ours = bench_pipeline(task, ("peft", "init_corda"), rounds=3)
    assert order == ["peft", "init_corda"] * 3
    assert (theirs.seconds, theirs.runs) == (8.0, (9.0, 7.0, 8.0))
    assert (ours.seconds, ours.runs) == (5.0, (5.0, 4.0, 6.0))
    assert (theirs.growth, theirs.growths) == (12, (11, 14, 12))
    # The bare pass is the same work in all runs: its own median.
    assert (theirs.bare, theirs.beyond, ours.bare, ours.beyond) == (2.0, 6.0, 0.5, 4.5)
    assert ours.passed
    assert not theirs.passed  # for one of its runs was wrong


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_stages_make_what_init_corda_makes(task: Task, tmp_path: Path, mode: str) -> None:
    task = Task(task.model, task.batches, mode, 4, CPU)
    subject = Subject(task, load_model(task.model), lambda: None, tmp_path)
    staged = METHODS["init_corda"](subject, Stages(0)).state_dict()
    config = CordaConfig(mode, rank=4, stability=False, progress=False)
    whole = init_corda(load_model(task.model), task.batches, config).state_dict()
    assert staged.keys() == whole.keys()
    assert all(torch.equal(staged[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", METHODS)
def test_every_contestant_adapts_all_layers_at_the_rank(
    task: Task, tmp_path: Path, name: str
) -> None:
    model = load_model(task.model)

    def forward() -> None:
        for ids in task.batches:
            model(input_ids=ids)

    stages = Stages(len(task.batches))
    adapted = METHODS[name](Subject(task, model, forward, tmp_path), stages)
    ranks = [
        tensor.shape[0]
        for key, tensor in adapted.state_dict().items()
        if key.endswith("lora_A.default.weight")
    ]
    # Two rows for each of four components.
    assert ranks == [8 if name == "init_corda" else 4] * 14
    expected = {"pissa": 0, "eva": stages.passes}.get(name, len(task.batches))
    assert stages.passes == expected
    assert name != "eva" or stages.passes > len(task.batches)  # until the last layer converges


def test_pissa_leaves_peft_as_it_was(task: Task, tmp_path: Path) -> None:
    from peft.tuners.lora.layer import LoraLayer

    before = LoraLayer.pissa_init
    broken = Task(task.model, task.batches, "ipm", 0, CPU)  # a rank that PEFT refuses
    subject = Subject(broken, load_model(task.model), lambda: None, tmp_path)
    with pytest.raises(ValueError, match="positive integer"):
        METHODS["pissa"](subject, Stages(0))
    assert LoraLayer.pissa_init is before


def test_forward_passes_are_a_stage_of_their_own() -> None:
    clocked = {"decomposition": 3.0, "calibration": 9.0, "attaching": 1.0}
    assert by_stage(clocked, 4.0) == {
        "forward": 4.0,
        "covariance": 5.0,
        "decomposition": 3.0,
        "attaching": 1.0,
    }
    assert by_stage({"decomposition": 9.0}, 4.0) == {"forward": 4.0, "decomposition": 5.0}
    assert by_stage({"decomposition": 9.0}, 0.0) == {"decomposition": 9.0}


@pytest.mark.usefixtures("_here")
def test_a_contestant_that_computes_something_else_has_no_speed(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = METHODS["patch_peft"]

    def other_end(subject: Subject, stages: Stages) -> nn.Module:
        return real(replace(subject, task=replace(subject.task, mode="kpm")), stages)

    monkeypatch.setitem(METHODS, "patch_peft", other_end)
    monkeypatch.setattr(pipeline, "sequences", lambda *_: task.batches)
    out = tmp_path / "results.json"
    only = "peft,patch_peft,init_corda"
    assert pipeline.main([task.model, "--rank", "4", "--only", only, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "patch_peft computes something else" in printed
    rows = {row["name"]: row for row in json.loads(out.read_text())["pipeline"]}
    assert rows["patch_peft"]["passed"] is False
    assert rows["init_corda"]["passed"] is True


def test_a_childs_failure_is_told(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    # Such a child has torch and transformers already.
    monkeypatch.setattr(pipeline.multiprocessing, "get_context", lambda _: CONTEXT)
    broken = Task(task.model, [torch.tensor([[1000]])], "ipm", 4, CPU)
    with pytest.raises(CordaError, match="the run of init_corda failed: IndexError"):
        list(bench_pipeline(broken, ("init_corda",)))


@pytest.mark.usefixtures("_here")
def test_rows_are_written_as_they_come(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(subject: Subject, stages: Stages) -> nn.Module:
        raise CordaError("stopped")

    monkeypatch.setitem(METHODS, "init_corda", stopped)
    monkeypatch.setattr(pipeline, "sequences", lambda *_: task.batches)
    out = tmp_path / "results.json"
    only = "init_corda,pissa,peft"
    assert pipeline.main([task.model, "--rank", "4", "--only", only, "--json", str(out)]) == 2
    assert "stopped" in capsys.readouterr().err
    results = json.loads(out.read_text())
    assert [row["name"] for row in results["pipeline"]] == ["peft"]  # whatever the order given
    assert results["task"]["model"] == "model"  # without its folder


def test_growth_and_time_are_written(tmp_path: Path) -> None:
    row = PipelineRow("patch_peft", 10.0, 3.0, 4.0, 1 << 20)
    assert row.to_json() == {
        "name": "patch_peft",
        "seconds": 10.0,
        "forward": 3.0,
        "bare": 4.0,
        "growth": 1 << 20,
        "stages": {},
        "overlap": None,
        "passed": True,
        "runs": (),
        "growths": (),
        "beyond": 6.0,
    }


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--only mine", "error: --only must be of peft, patch_peft, init_corda, pissa, eva, got"),
        ("--rank 0", "error: --rank must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    assert pipeline.main(["model", *option.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
