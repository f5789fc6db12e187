"""Several ranks under torchrun, on the CPU, against one process that does it all."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_script import CONFIG, ROUTED, five_batches, mixture
from ranks import run_ranks
from torch import nn
from typer.testing import CliRunner

from corda_kernels import CordaConfig, CovarianceSet, calibrate
from corda_kernels.adapter import read_adapter
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.cli import app
from corda_kernels.errors import CalibrationError, ConfigError, DistributedError
from corda_kernels.init import corda_adapter
from corda_kernels.planning import Selection

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("rank_script.py"))

# What both ranks are told where something differs between them.
TOLD = {
    "targets": "at calibrate the ranks differ in targets (",
    "data": "at calibrate the ranks differ in data (",
    "data that is read once": "at the end of the text the ranks differ in data (",
    "data of blocks": "at the end of the text the ranks differ in data (",
    "batches": "number of batches (5 on rank 0, 4 on rank 1), data (",
    "batches that are read once": "at the end of the text the ranks differ in number of batches (5",
    "weights": "at calibrate the ranks differ in weights (",
    "dtype": "dtype (float32 on rank 0, bfloat16 on rank 1), weights (",
    "outlier_threshold": "differ in outlier_threshold (6.0 on rank 0, 7.0 on rank 1): give every",
    "normalize": "at calibrate the ranks differ in normalize (tokens on rank 0, peft on rank 1): ",
    "on_unseen": "differ in on_unseen (error on rank 0, skip on rank 1): give every rank the same",
    "checkpoint": "differ in checkpoint (none on rank 0, kept on rank 1): give every rank the same",
    "resume": "differ in checkpoint (kept on rank 0, resumed on rank 1): give every rank the same",
    "entry": "different steps (calibrate on rank 0, calibrate_blocks on rank 1): make the same ",
    "parts": "at calibrate_blocks the ranks differ in parts (1 on rank 0, 2 on rank 1): give every",
    "halves": "at covariance_stages the ranks differ in data (",
    "rank of halves": "at covariance_stages the ranks differ in rank (4 on rank 0, 5 on rank 1): ",
    "number of candidates": "differ in candidates (2 on rank 0, 3 on rank 1): give every rank the ",
    "limit": "the ranks differ in memory_limit (None on rank 0, 0 on rank 1): give every rank the ",
    "selection": "differ in selection (argmin on rank 0, pool on rank 1): give every rank the same",
    "candidates of a selection": "(layer_spectra on rank 0, the end of the candidates on rank 1)",
    "covariances scored": "covariances (on rank 0, on rank 1): give every rank the same",
    "covariances": "covariances (on rank 0, on rank 1): give every rank the same",
    "kind of data": "differ in data (batches on rank 0, covariances on rank 1), ",
    "use_peft": "at init_corda the ranks differ in use_peft (True on rank 0, False on rank 1): ",
    "init or calibrate": "different steps (calibrate on rank 0, init_corda on rank 1): make the ",
    "nothing": "went on",
    **{
        name: f"at corda_adapter the ranks differ in {name} ({first} on rank 0, {second} on rank 1)"
        for name, (first, second) in CONFIG.items()
    },
}


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script by torchrun, which forks the ranks: they need not load torch again."""
    options = ["--standalone", "--nproc-per-node", ranks, "--run-path", "--start-method", "fork"]
    return run_ranks(1, "-m", "torch.distributed.run", *options, *arguments)


@pytest.fixture(scope="module")
def place(
    calibrated: Callable[..., tuple[nn.Module, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, list[Any], Path]:
    """A model, batches for it, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("ranks")
    model, _ = calibrated()
    model.save_pretrained(folder / "model")
    return model, five_batches(), folder


def same(found: CovarianceSet, expected: CovarianceSet) -> None:
    assert list(found) == list(expected)
    assert [names for _, names in found.groups()] == [names for _, names in expected.groups()]
    for name, covariance in found.items():
        whole = expected[name]
        assert (covariance.matrix - whole.matrix).norm() < 1e-6 * whole.matrix.norm(), name
        assert torch.equal(covariance.matrix, covariance.matrix.T)
        assert (covariance.tokens, covariance.calls) == (whole.tokens, whole.calls)
        torch.testing.assert_close(covariance.absmax, whole.absmax, rtol=1e-5, atol=0)
        assert torch.equal(covariance.outlier_count, whole.outlier_count)
    assert found.provenance == expected.provenance | {"model": found.provenance["model"]}


@pytest.fixture(scope="module")
def worked(
    place: tuple[nn.Module, list[Any], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, Path]:
    """A number of ranks, and the folder with what they made."""
    out = tmp_path_factory.mktemp("out")
    ended = run_ranks(3, SCRIPT, "work", place[2] / "model", out)
    assert ended.returncode == 0, ended.stderr
    return 3, out


def test_ranks_give_the_covariances_of_one_process(
    place: tuple[nn.Module, list[Any], Path], worked: tuple[int, Path]
) -> None:
    model, batches, _ = place
    ranks, out = worked
    expected = calibrate(model, batches, progress=False)
    files = [out / f"whole-{rank}" for rank in range(ranks)]
    for file in files:
        same(CovarianceSet.load(file), expected)
        assert file.read_bytes() == files[0].read_bytes()


@pytest.mark.filterwarnings("ignore:no token was routed")
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_ranks_add_up_experts_that_only_some_of_them_reach(
    place: tuple[nn.Module, list[Any], Path], worked: tuple[int, Path]
) -> None:
    _, batches, _ = place
    ranks, out = worked
    expected = calibrate(mixture(), batches, experts="shared", progress=False)
    for rank in range(ranks):
        same(CovarianceSet.load(out / f"experts-{rank}"), expected)
    expected = calibrate(mixture(), batches, progress=False, **ROUTED)
    for rank in range(ranks):
        found = CovarianceSet.load(out / f"routed-{rank}")
        same(found, expected)
        for name, whole in expected.gradients.items():
            for part in ("matrix", "mean", "fisher_trace"):
                exact = getattr(whole, part)
                assert (getattr(found.gradients[name], part) - exact).norm() < 1e-5 * exact.norm()


def test_ranks_give_the_gradients_and_the_task_start_of_one_process(
    place: tuple[nn.Module, list[Any], Path], worked: tuple[int, Path]
) -> None:
    model, batches, _ = place
    ranks, out = worked
    expected = calibrate(model, batches, sides="both", labels="sampled", progress=False)
    for way in ("both", "both-blocks"):
        found = [CovarianceSet.load(out / f"{way}-{rank}") for rank in range(ranks)]
        same(found[0], expected)
        assert list(found[0].gradients) == list(expected.gradients)
        for name, whole in expected.gradients.items():
            for part in ("matrix", "mean", "fisher_trace"):
                first, *others = (getattr(each.gradients[name], part) for each in found)
                error = (first - getattr(whole, part)).norm() / getattr(whole, part).norm()
                assert error < 1e-5, (name, part)
                assert all(torch.equal(first, other) for other in others)
    task = corda_adapter(
        model, batches, CordaConfig("task", rank=4, progress=False), keep=batches[1:]
    )
    made = [read_adapter(out / f"task-{rank}").layers for rank in range(ranks)]
    for name, layer in task.layers.items():
        A = made[0][name].A
        signs = (A * layer.A).sum(1, keepdim=True).sign()
        assert (signs * A - layer.A).norm() < 1e-2 * layer.A.norm(), name
        assert all(torch.equal(A, other[name].A) for other in made)


def test_ranks_share_blocks_too(
    place: tuple[nn.Module, list[Any], Path], worked: tuple[int, Path]
) -> None:
    model, batches, _ = place
    ranks, out = worked
    # Three ranks and a part of two batches: one rank has nothing to run in it.
    assert len(list(out.glob("part-*"))) == ranks * 2 * 2
    for part in range(2):
        whole = calibrate(model, batches[part::2], progress=False)
        found = {
            name: covariance
            for block in range(2)
            for name, covariance in CovarianceSet.load(out / f"part-1-{block}-{part}").items()
        }
        same(CovarianceSet(found, provenance=whole.provenance), whole)


def test_ranks_make_the_adapter_of_one_process(
    place: tuple[nn.Module, list[Any], Path],
    worked: tuple[int, Path],
    same_components: Callable[..., bool],
) -> None:
    model, batches, _ = place
    ranks, out = worked
    config = CordaConfig("kpm", rank=4, stability=True, progress=False)
    expected = corda_adapter(model, batches, config)
    files = [out / f"adapter-{rank}" / "adapter_model.safetensors" for rank in range(ranks)]
    assert len({file.read_bytes() for file in files}) == 1
    found = read_adapter(out / "adapter-0")
    assert list(found.layers) == list(expected.layers)
    for name, layer in found.layers.items():
        assert same_components(layer, expected.layers[name]), name
    assert found.record.stability["layers"].keys() == expected.record.stability["layers"].keys()


@pytest.mark.parametrize(
    ("name", "options"), [("planned", {"budget": "r=4"}), ("blocks", {})], ids=["budget", "blocks"]
)
def test_ranks_choose_candidates_and_share_a_budget_out_as_one_process(
    place: tuple[nn.Module, list[Any], Path],
    worked: tuple[int, Path],
    same_components: Callable[..., bool],
    name: str,
    options: dict[str, Any],
) -> None:
    model, batches, _ = place
    ranks, out = worked
    config = CordaConfig("kpm", rank=4, progress=False, candidates=2, **options)
    expected = corda_adapter(model, batches, config)
    adapters = [read_adapter(out / f"{name}-{rank}") for rank in range(ranks)]
    assert all(adapter.record == adapters[0].record for adapter in adapters)
    found = adapters[0]
    assert found.record.allocation == expected.record.allocation
    chosen, whole = (
        Selection.from_json(adapter.record.calibration["selection"])
        for adapter in (found, expected)
    )
    assert chosen.winners() == whole.winners()
    assert list(found.layers) == list(expected.layers)
    for layer, made in found.layers.items():
        assert same_components(made, expected.layers[layer]), layer


def test_a_rank_that_dies_ends_the_others_with_its_reason(
    place: tuple[nn.Module, list[Any], Path], tmp_path: Path
) -> None:
    _, _, folder = place
    arguments = ["die", folder / "model", tmp_path]
    ended = torchrun(2, SCRIPT, *arguments)
    assert ended.returncode != 0
    # It names the one that it finds ended first: the one that died, or the one that noticed that.
    reasons = ("Signal 9 (SIGKILL)", "rank 0: another rank has ended or cannot be reached")
    assert any(reason in ended.stderr for reason in reasons)

    # Without torchrun to end them, the survivors find out by themselves.
    ended = run_ranks(2, SCRIPT, *arguments)
    assert ended.returncode == 2
    assert "rank 0: another rank has ended or cannot be reached" in ended.stderr


def test_ranks_go_on_from_where_each_of_them_was(
    place: tuple[nn.Module, list[Any], Path], tmp_path: Path
) -> None:
    model = place[2] / "model"
    whole, out = tmp_path / "whole", tmp_path / "out"
    for what, folder in (("resumed", whole), ("kept", out), ("resumed", out)):
        folder.mkdir(exist_ok=True)
        ended = run_ranks(2, SCRIPT, what, model, folder)
        assert ended.returncode == 0, ended.stderr
        if what == "kept":
            # The one that calibrated less of the text keeps fewer of its own batches.
            assert sorted(file.name for file in out.iterdir()) == [
                "blocks-block-0-rank-0-of-2",
                "blocks-block-0-rank-1-of-2",
                "blocks-block-1-rank-1-of-2",
                "pass-rank-0-of-2",
                "pass-rank-1-of-2",
            ]
    results = sorted(file.name for file in whole.glob("[wp]*-*") if "rank" not in file.name)
    assert len(results) == 2 + 2 * 2 * 2
    for name in results:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name

    ended = run_ranks(3, SCRIPT, "resumed", model, out)
    assert ended.returncode != 0
    assert "is the checkpoint of another run, which differs in ranks" in ended.stderr


def test_the_command_line_works_on_two_ranks(
    place: tuple[nn.Module, list[Any], Path],
    tmp_path: Path,
    save_tokenizer: Callable[[Path], None],
    same_components: Callable[..., bool],
) -> None:
    folder = place[2] / "model"
    save_tokenizer(folder)
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * i + i // 9) % 60}" for i in range(2000)))
    options = ["--data", tmp_path / "text.txt", "--samples", 9, "--seq-len", 16, "--rank", 4]
    command = ["-m", "corda_kernels"]
    for what, more in (("calibrate", []), ("init", ["--mode", "ipm"])):
        arguments = [what, folder, tmp_path / f"one-{what}", *options, *more]
        alone = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert alone.exit_code == 0
        arguments[2] = tmp_path / f"two-{what}"
        ended = run_ranks(2, *command, *arguments)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == alone.stdout.replace("one-", "two-")
    one, two = (CovarianceSet.load(tmp_path / f"{name}-calibrate") for name in ("one", "two"))
    one.provenance.pop("stability")
    two.provenance.pop("stability")
    same(two, one)
    first, second = (read_adapter(tmp_path / f"{name}-init") for name in ("one", "two"))
    for name, layer in second.layers.items():
        assert same_components(layer, first.layers[name]), name

    kept = tmp_path / "two-calibrate.checkpoint-1-rank-1-of-2"
    kept.touch()
    arguments = ["calibrate", folder, tmp_path / "two-calibrate", *options, "--overwrite"]
    ended = run_ranks(2, *command, *arguments)
    assert ended.returncode != 0
    assert f"error: {kept} was left by an interrupted run" in ended.stderr
    ended = run_ranks(2, *command, *arguments, "--resume")
    assert ended.returncode != 0
    assert f"error: {kept} is truncated" in ended.stderr


def test_an_error_on_a_rank_is_one_line_and_ends_all(
    place: tuple[nn.Module, list[Any], Path],
    tmp_path: Path,
    save_tokenizer: Callable[[Path], None],
) -> None:
    model = copy.deepcopy(place[0])
    model.get_submodule("model.layers.0.self_attn.v_proj").weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 60}" for i in range(200)))
    # One sequence: it falls to rank 0, and rank 1 waits.
    options = ["--data", tmp_path / "text.txt", "--samples", 1, "--seq-len", 32, "--rank", 4]
    command = ["-m", "corda_kernels", "init", tmp_path / "model", tmp_path / "out"]
    ended = run_ranks(2, *command, *options, "--mode", "ipm")
    assert ended.returncode != 0
    assert "rank 0: error: layer model.layers.0.self_attn.o_proj received NaN" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def told(
    place: tuple[nn.Module, list[Any], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What each of two ranks was told of each difference, all by one pair of processes."""
    out = tmp_path_factory.mktemp("told")
    ended = run_ranks(2, SCRIPT, "differ", place[2] / "model", out)
    assert ended.returncode == 0, ended.stderr
    return [json.loads((out / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("what", TOLD)
def test_ranks_that_were_given_different_things_are_all_told_which(
    told: list[dict[str, str]], what: str
) -> None:
    assert TOLD[what] in told[0][what]
    assert told[0] == told[1]
    assert told[0].keys() == TOLD.keys()


def test_only_so_many_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight ranks six have another rank's seed."""

    def gathered(values: list[Any], value: tuple[str, dict[str, str]]) -> None:
        values[:] = [(value[0], value[1] | {"seed": str(rank // 2)}) for rank in range(8)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    named = r"seed \(0 on rank 0, 1 on rank 2, 1 on rank 3, 2 on rank 4, …\): give every"
    with pytest.raises(DistributedError, match=named):
        Ranks(0, 8).agree("start", lambda: {"seed": 0})


@pytest.fixture
def captured() -> InputCapture:
    """Sums of one input that two layers share, and of another."""
    layers = nn.ModuleDict({name: nn.Linear(5, 3) for name in "abc"})
    first, second = torch.randn(2, 7, 5)
    with InputCapture(dict(layers.items())) as capture:
        for name, x in zip("abc", (first, first, second), strict=True):
            layers[name](x)
    return capture


def sums_of(capture: InputCapture) -> dict[str, torch.Tensor]:
    return {name: part.matrix for part, names in capture.sums() for name in names}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
def test_sums_are_added_up_where_they_are(
    captured: InputCapture, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """The other rank has the same sums, of which layers a and b may not share theirs."""

    def gathered(values: list[Any], value: tuple[str, dict[str, Any]]) -> None:
        step, places = value
        values[:] = [value, (step, places | ({} if shared else {"b": 7}))]

    def reduced(tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        if op == torch.distributed.ReduceOp.SUM:
            tensor *= 2

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    before = sums_of(captured)
    expected = {name: 2 * matrix.clone() for name, matrix in before.items()}
    Ranks(0, 2).add_up(captured, torch.device("cpu"))
    after = sums_of(captured)
    for name, matrix in after.items():
        assert torch.equal(matrix.tril(), expected[name].tril()), name
    places = {matrix.data_ptr() for matrix in after.values()}
    assert places >= {matrix.data_ptr() for matrix in before.values()}
    assert len(places) == (2 if shared else 3)
    assert [part.tokens for part, _ in captured.sums()] == [14] * len(captured.sums())


def test_a_rank_that_runs_out_of_memory_does_not_blame_another(
    captured: InputCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def gathered(values: list[Any], value: object) -> None:
        values[:] = [value, value]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    monkeypatch.setattr(torch.distributed, "all_reduce", full)
    with pytest.raises(CalibrationError, match=r"too little memory to add up .* at layer a: go bl"):
        Ranks(0, 2).add_up(captured, torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_gather_object", full)
    with pytest.raises(torch.OutOfMemoryError):
        Ranks(0, 2).gather(0, "a step")


def test_work_is_shared_out_evenly() -> None:
    sizes = [9, 1, 1, 1, 3, 3, 3, 8, 1, 1]  # a layer's decomposition costs the square of it
    layers = {f"layer{i}": nn.Linear(1, size) for i, size in enumerate(sizes)}
    shares = [Ranks(rank, 3).share_layers(layers) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(layers)
    assert max(sum(layer.out_features**2 for layer in share.values()) for share in shares) <= 81
    assert list(Ranks().share_layers(layers)) == list(layers)


def test_distributed_work_needs_a_process_group(place: tuple[nn.Module, list[Any], Path]) -> None:
    with pytest.raises(ConfigError, match="start the program with torchrun"):
        calibrate(place[0], place[1], distributed=True, progress=False)
