from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetuning.claims import claim
from finetuning.data import Item, gradient_batches
from finetuning.experiment import CALIBRATION, QUIZ, TEST, TRAIN, Experiment, collected
from finetuning.methods import METHODS, start
from finetuning.profiles import PROFILES, Profile, Run
from finetuning.table import table
from torch import nn

from corda_kernels import CovarianceSet, calibrate
from corda_kernels.errors import ConfigError, DataError
from corda_kernels.files import write_json

pytestmark = pytest.mark.slow

PROFILE = replace(
    PROFILES["smoke"],
    methods=(("lora", "ipm-hold1"),),
    apart=4,
    rank=2,
    steps=4,
    checkpoints=(2, 4),
    max_tokens=32,
    questions=12,
    ranked=12,
    texts=2,
    text_tokens=16,
    samples=2,
    seq_len=32,
)


@pytest.fixture(scope="session")
def folders(
    tiny_model: Callable[..., nn.Module],
    save_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A tiny model with a tokenizer, and data of its words."""
    model, data = (tmp_path_factory.mktemp(name) for name in ("model", "data"))
    torch.manual_seed(0)
    tiny_model("llama", initializer_range=0.2).save_pretrained(model)
    save_tokenizer(model)
    for name in (TRAIN, TEST, CALIBRATION, QUIZ):
        answered = name in (TRAIN, TEST)
        lines = []
        for index in range(40):
            answer = f"w{index + 3} w{index % 7}"
            record = {
                "question": f"w{index} w{index + 1}",
                "answer": answer if answered else [answer],
            }
            lines.append(json.dumps(record))
        (data / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(model), data


@pytest.fixture
def open_(folders: tuple[str, Path], tmp_path: Path) -> Callable[..., Experiment]:
    def make(profile: Profile = PROFILE) -> Experiment:
        return Experiment(*folders, tmp_path / "out", "smoke", profile, None)

    return make


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning")
def test_an_experiment_goes_on_where_it_was_killed(
    open_: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_()
    first, second = PROFILE.grid(PROFILE.methods[0])

    def killed(run: Run) -> None:
        if run == second:
            raise KeyboardInterrupt
        Experiment.do(experiment, run)

    monkeypatch.setattr(experiment, "do", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.go_on()
    assert len(collected(experiment.folder)["runs"]) == 1
    kept = experiment.file(first).read_bytes()
    again = open_()
    again.go_on()
    assert again.file(first).read_bytes() == kept
    results = collected(again.folder)
    assert [run["method"] for run in results["runs"]] == ["lora", "ipm-hold1"]
    assert results["planned"] == 2
    for run in results["runs"]:
        assert [point["step"] for point in run["checkpoints"]] == [2, 4]
        assert len(run["training_loss"]) == 4
        assert run["trainable"] == results["runs"][0]["trainable"]
    # All started from the same loss on the same problems, which the adapter leaves as it was.
    start_losses = [run["training_loss"][0] for run in results["runs"]]
    assert start_losses == pytest.approx([start_losses[0]] * 2, rel=1e-4)
    assert table(results).startswith("2 of 2 runs (profile smoke)")


def test_a_run_that_another_process_does_is_left_to_it(
    open_: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_()
    first, second = PROFILE.grid(PROFILE.methods[0])
    done: list[Run] = []
    monkeypatch.setattr(experiment, "do", done.append)
    with claim(experiment.work / f"{first.name}.lock") as held:
        assert held
        experiment.go_on()
    assert done == [second]


def _with_losses(experiment: Experiment, done: list[Run], losses: dict[float, float]) -> None:
    """Makes the experiment's runs end at once, with a loss for each learning rate."""
    write_json(experiment.folder / "base.json", {"items": {}})

    def do(run: Run) -> None:
        done.append(run)
        result = {
            "method": run.method.name,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "training_loss": [losses[run.learning_rate]] * experiment.profile.steps,
        }
        write_json(experiment.file(run), result)

    experiment.do = do  # type: ignore[method-assign]


def test_only_the_best_rate_is_run_with_the_other_seeds(open_: Callable[..., Experiment]) -> None:
    profile = replace(PROFILE, methods=(("lora",),), learning_rates=3, seeds=(3,))
    first, second, third = METHODS["lora"].learning_rates[:3]
    experiment = open_(profile)
    done: list[Run] = []
    _with_losses(experiment, done, {first: 1.1, second: 0.9, third: 1.0})
    experiment.go_on()
    assert [(run.learning_rate, run.seed) for run in done] == [
        (first, 0),
        (second, 0),
        (third, 0),
        (second, 1),
        (second, 2),
    ]
    results = collected(experiment.folder)
    assert results["planned"] == len(results["runs"]) == 5
    again = open_(profile)
    _with_losses(again, done, {})
    again.go_on()
    assert len(done) == 5


def test_rates_that_are_as_good_by_one_seed_are_run_with_all(
    open_: Callable[..., Experiment],
) -> None:
    profile = replace(PROFILE, methods=(("lora",),), learning_rates=3, seeds=(2,), tie=0.03)
    first, second, third = METHODS["lora"].learning_rates[:3]
    experiment = open_(profile)
    done: list[Run] = []
    _with_losses(experiment, done, {first: 1.02, second: 1.0, third: 1.04})
    experiment.go_on()
    again = [run.learning_rate for run in done if run.seed]
    assert again == [first, second]
    results = collected(experiment.folder)
    assert results["planned"] == len(results["runs"]) == 5


def test_the_best_rate_is_not_chosen_before_another_process_has_done_its_run(
    open_: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = replace(PROFILE, methods=(("lora",),), learning_rates=2, seeds=(2,))
    first, second = METHODS["lora"].learning_rates[:2]
    experiment = open_(profile)
    done: list[Run] = []
    _with_losses(experiment, done, {first: 1.0, second: 0.9})
    taken = Run(METHODS["lora"], second, 0)
    waits = threading.Event()

    def noted(path: Path, *, wait: bool = False) -> AbstractContextManager[bool]:
        if wait and path.stem == taken.name:
            waits.set()
        return claim(path, wait=wait)

    monkeypatch.setattr("finetuning.experiment.claim", noted)
    with claim(experiment.work / f"{taken.name}.lock"):
        worker = threading.Thread(target=experiment.go_on)
        worker.start()
        assert waits.wait(timeout=30)
        assert worker.is_alive()
        assert [run.learning_rate for run in done] == [first]
        experiment.do(taken)
    worker.join()
    assert done[2:] == [Run(METHODS["lora"], second, 1)]


def test_an_experiment_of_other_settings_is_not_mixed_in(
    open_: Callable[..., Experiment],
) -> None:
    open_()
    open_(replace(PROFILE, minutes=1.0))  # of no influence on a run
    with pytest.raises(ConfigError, match="other settings"):
        open_(replace(PROFILE, steps=5))


def test_missing_data_is_named(folders: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=TRAIN):
        Experiment(folders[0], tmp_path, tmp_path / "out", "smoke", PROFILE, None)
    with pytest.raises(DataError, match=r"settings\.json is missing"):
        collected(tmp_path)


def test_after_its_minutes_no_run_is_begun(
    open_: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_(replace(PROFILE, minutes=0.0))
    done: list[Run] = []
    monkeypatch.setattr(experiment, "do", done.append)
    experiment.go_on()
    assert not done


def test_a_start_is_made_once_and_its_time_counts_for_every_run(
    open_: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_(replace(PROFILE, methods=(("task-frozen",),)))
    method = METHODS["task-frozen"]
    first, spent = experiment.start(Run(method, 1e-3, 0))
    monkeypatch.setattr("finetuning.experiment.start", None)
    again, counted = experiment.start(Run(method, 3e-3, 1))
    assert counted == spent
    made = {path.name for path in experiment.work.glob("*.seconds.json")}
    assert made == {f"{name}.seconds.json" for name in ("task", "kpm", "start-task-frozen")}
    parameters = dict(again.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameters[name], parameter)
        assert parameters[name].requires_grad == ("lora_B" in name)


def test_starts_know_no_problem_that_is_trained_on(
    open_: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_()
    given: list[Item] = []

    def noted(items: list[Item], size: int) -> list[dict[str, torch.Tensor]]:
        given.extend(items)
        return gradient_batches(items, size)

    monkeypatch.setattr("finetuning.experiment.gradient_batches", noted)
    experiment.covariances("task")
    assert len(given) == PROFILE.apart
    assert not [item for item in given if item in experiment.training_problems]


def test_controls_differ_from_what_they_control_in_one_thing(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
) -> None:
    rank, covariances = 2, calibrated()[1]
    adapted = {
        name: start(
            METHODS[name], calibrated()[0], rank=rank, seed=0, covariances=lambda _: covariances
        )
        for name in ("lora", "white", "kpm-hold1", "random")
    }
    for name in covariances:
        factors = {}
        for method, model in adapted.items():
            layer = model.get_base_model().get_submodule(name)  # type: ignore[operator]
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            factors[method] = A.detach().double(), B.detach().double()
        C = covariances[name].matrix.double()
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
        # LoRA's own rows Z times a root of C⁻¹: A C Aᵀ is Z Zᵀ, but for the scale.
        white, B = factors["white"]
        grams = white @ C @ white.mT, factors["lora"][0] @ factors["lora"][0].mT
        assert torch.allclose(*(gram / gram.norm() for gram in grams), atol=1e-5)
        assert white.square().mean().sqrt() == pytest.approx((3 * len(C)) ** -0.5, rel=1e-5)
        assert not B.any()
        # Lengths are KPM's, and S is made of U as KPM does; U is another.
        (A, B), (A0, B0) = factors["random"], factors["kpm-hold1"]
        assert torch.allclose(A.norm(dim=1), A0.norm(dim=1), atol=1e-6)
        assert torch.allclose(B.norm(dim=0), B0.norm(dim=0), atol=1e-6)
        W = calibrated()[0].get_submodule(name).weight.double()  # type: ignore[operator]
        rows = nn.functional.normalize(B[:, :rank].mT @ W, dim=1)
        assert torch.allclose(nn.functional.normalize(A[rank:], dim=1), rows, atol=1e-5)
        assert (B - B0).norm() > 0.1 * B0.norm()


# Of what is held the least and the most stand for those between.
@pytest.mark.parametrize(
    "name", [name for name in METHODS if not name.endswith(("-hold4", "-hold8"))]
)
def test_every_method_starts_at_the_base_with_the_same_budget(
    name: str,
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
    same_logits: Callable[..., bool],
    logits: Callable[[nn.Module], torch.Tensor],
) -> None:
    base, covariances = calibrated()
    method = METHODS[name]
    model, _ = calibrated()
    asked = []
    text = torch.randint(3, 64, (2, 6, 16), generator=torch.Generator().manual_seed(0))
    labels = "sampled" if method.samples == ("kpm-both",) else "given"
    both = calibrate(model, text, sides="both", labels=labels, progress=False)

    def give(sample: str) -> CovarianceSet:
        asked.append(sample)
        return covariances if sample in ("kpm", "ipm", "kpm++", "ipm++") else both

    adapted = start(method, model, rank=2, seed=0, covariances=give)
    assert asked == list(method.samples)
    assert same_logits(logits(adapted), base)
    used = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    layers = [each for each in base.model.modules() if isinstance(each, nn.Linear)]
    sizes = [layer.weight.shape[:1] if method.freeze_a else layer.weight.shape for layer in layers]
    budget = sum(method.rows * 2 * sum(size) for size in sizes)
    assert used == budget if "++" not in name else 0.8 * budget < used <= budget


def test_a_profile_names_every_run_once_and_measures_at_its_end() -> None:
    for profile in PROFILES.values():
        runs = [run for group in profile.methods for run in profile.grid(group)]
        assert len({run.name for run in runs}) == len(runs)
        first = [run for run in runs if run.learning_rate == run.method.learning_rates[0]]
        again = [each for run in first for each in profile.repeats(run)]
        assert profile.planned({}) == len(runs) + len(again)
        assert profile.checkpoints[-1] == profile.steps
