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
from finetuning.experiment import CALIBRATION, QUIZ, TEST, TRAIN, Experiment, collected
from finetuning.methods import METHODS, start
from finetuning.profiles import PROFILES, Profile, Run
from finetuning.table import table
from torch import nn

from corda_kernels import CovarianceSet
from corda_kernels.errors import ConfigError, DataError
from corda_kernels.files import write_json

pytestmark = pytest.mark.slow

PROFILE = replace(
    PROFILES["smoke"],
    methods=(("lora", "ipm-hold1"),),
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
    first, second, third = METHODS["lora"].learning_rates
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

    def give(mode: str, plus: bool) -> CovarianceSet:
        asked.append((mode, plus))
        return covariances

    adapted, _ = start(method, model, rank=2, seed=0, covariances=give)
    assert asked == ([] if method.mode is None else [(method.mode, method.plus)])
    assert same_logits(logits(adapted), base)
    used = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    layers = [each for each in base.model.modules() if isinstance(each, nn.Linear)]
    budget = sum(method.rows * 2 * sum(layer.weight.shape) for layer in layers)
    assert used == budget if not method.plus else 0.8 * budget < used <= budget


def test_a_profile_names_every_run_once_and_measures_at_its_end() -> None:
    for profile in PROFILES.values():
        runs = [run for group in profile.methods for run in profile.grid(group)]
        assert len({run.name for run in runs}) == len(runs)
        first = [run for run in runs if run.learning_rate == run.method.learning_rates[0]]
        again = [each for run in first for each in profile.repeats(run)]
        assert profile.planned == len(runs) + len(again)
        assert profile.checkpoints[-1] == profile.steps
