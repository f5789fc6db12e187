"""An experiment in a folder: what all runs share, each run's file, and going on after a kill.

settings.json         what was asked for; another experiment is not mixed into it
base.json             measures of the model before any training
runs/NAME.json        one run each
.work/                covariances, adapters as they start, and locks, of no use afterwards
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels import (
    CovarianceSet,
    calibrate,
    load_for_training,
    load_model,
    load_tokenizer,
    save_adapter,
    token_batches,
)
from corda_kernels.bench.timing import environment
from corda_kernels.errors import ConfigError, DataError
from corda_kernels.files import write_json
from corda_kernels.init import CalibrationPlan, covariance_stages
from corda_kernels.sources import help_topics

from .claims import claim
from .comparison import candidates
from .data import (
    PROBLEM,
    QUESTION,
    Item,
    gradient_batches,
    plain_problems,
    problems,
    prose,
    read_records,
    training_batches,
)
from .forms import changes, components, share_outside
from .measures import Examination, coded_changes, estimate, quiz
from .methods import Sample, start
from .profiles import Profile, Run
from .training import train

TRAIN, TEST = "gsm8k_train.jsonl", "gsm8k_test.jsonl"
CALIBRATION, QUIZ = "nq_open_dev.jsonl", "nq_open_efficientqa_dev.jsonl"


class Stopwatch:
    """Time since it was made, of the clock and of this process on all its threads."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """By kind, "wall" and "cpu"."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall": round(wall, 3), "cpu": round(cpu, 3)}


def _sum(*spent: dict[str, float]) -> dict[str, float]:
    return {kind: round(sum(each[kind] for each in spent), 3) for kind in ("wall", "cpu")}


class Experiment:
    """The runs of a profile on one model, in one folder."""

    def __init__(
        self, model: str, data: Path, folder: Path, name: str, profile: Profile, text: Path | None
    ) -> None:
        """Opens the folder, or begins one.

        Args:
            model: a folder, hub id or GGUF file.
            data: the folder with the four files named above.
            folder: of the results.
            name: the profile's.
            profile: the sizes.
            text: prose to measure on; None for Python's help topics.

        Raises:
            DataError: a file is missing.
            ConfigError: the folder holds another experiment.
        """
        missing = [file for file in (TRAIN, TEST, CALIBRATION, QUIZ) if not (data / file).is_file()]
        if missing:
            raise DataError(f"{data} lacks {', '.join(missing)}: see the beginning of finetune.py")
        self.model, self.data, self.folder, self.text = model, data, folder, text
        self.profile = profile
        self.work = folder / ".work"
        self.device = torch.device(profile.device)
        settings = {
            "profile": name,
            "model": Path(model).name,
            "text": "Python's help topics" if text is None else text.name,
            **dataclasses.asdict(profile),
        }
        settings.pop("minutes")
        settings = json.loads(json.dumps(settings))
        file = folder / "settings.json"
        with claim(self.work / "settings.lock", wait=True):
            if not file.exists():
                write_json(file, settings)
            elif json.loads(file.read_text(encoding="utf-8")) != settings:
                raise ConfigError(f"{folder} holds an experiment of other settings: give another")

    def file(self, run: Run) -> Path:
        """Where the result of a run is written."""
        return self.folder / "runs" / f"{run.name}.json"

    def go_on(self) -> None:
        """Does all runs that are neither done nor being done by another process."""
        started = time.monotonic()
        for run, needed in self._runs():
            limit = self.profile.minutes
            if limit is not None and time.monotonic() - started > 60 * limit:
                return
            with claim(self.work / f"{run.name}.lock", wait=needed) as held:
                if held and not self.file(run).exists():
                    self.do(run)

    def _runs(self) -> Iterator[tuple[Run, bool]]:
        """All runs in order, and whether the choice of the next ones needs the result."""
        for group in self.profile.methods:
            grid = list(self.profile.grid(group))
            yield from ((run, False) for run in grid)
            if not any(self.profile.repeats(grid[0])):
                continue
            for name in group:
                tried = [run for run in grid if run.method.name == name]
                yield from ((run, True) for run in tried)
                tied = candidates(collected(self.folder)).get(name, [])
                rates = {runs[0]["learning_rate"] for runs in tied}
                for run in tried:
                    if run.learning_rate in rates:
                        yield from ((again, False) for again in self.profile.repeats(run))

    def do(self, run: Run) -> None:
        """Does one run and writes its file."""
        base = self.base()
        whole = Stopwatch()
        model, started = self.start(run)
        checkpoints: list[dict[str, Any]] = []
        measuring = {"wall": 0.0, "cpu": 0.0}

        def measure(step: int) -> None:
            if step in self.profile.checkpoints:
                clock = Stopwatch()
                items = self.examination.take(model)
                found = _measures(items, base)
                coded = {name: coded_changes(items[name] - base[name]) for name in items}
                checkpoints.append({"step": step, **found, "items": coded})
                shown = ", ".join(f"{key} {found[key]['mean']:.4f}" for key in found)
                print(f"{run.name} step {step}: {shown}", flush=True)
                measuring.update(_sum(measuring, clock.seconds()))

        batches = training_batches(
            self.training_problems,
            steps=self.profile.steps,
            size=self.profile.batch_size,
            seed=run.seed,
        )
        clock = Stopwatch()
        losses = train(model, batches, run.learning_rate, after_step=measure)
        training = clock.seconds()
        training = {name: seconds - measuring[name] for name, seconds in training.items()}
        write_json(
            self.file(run),
            {
                "method": run.method.name,
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "training_loss": [round(loss, 6) for loss in losses],
                "checkpoints": checkpoints,
                **(self._ranks(model, base) if self.profile.ranked else {}),
                "outside": self._outside(run, model) if self.profile.outside else None,
                "seconds": {"start": started, "training": training, "run": whole.seconds()},
                "environment": environment(self.device),
            },
        )

    def start(self, run: Run) -> tuple[nn.Module, dict[str, float]]:
        """The model with a run's adapter, and the seconds that making it takes from nothing.

        What all runs of a method share is made once, and its time counted to each of them.
        """
        method = run.method
        spent = [self._once(name, partial(self._calibrate, name)) for name in method.samples]
        model = self._model()

        def begun(model: nn.Module) -> nn.Module:
            return start(
                method,
                model,
                rank=self.profile.rank,
                seed=run.seed,
                covariances=self.covariances,
            )

        if method.stored:
            folder = self.work / f"start-{method.name}"
            make = lambda: save_adapter(begun(self._model()), folder)  # noqa: E731
            spent.append(self._once(folder.name, make))
            return load_for_training(model, folder), _sum(*spent)
        clock = Stopwatch()
        adapted = begun(model)
        return adapted, _sum(*spent, clock.seconds())

    def _model(self) -> nn.Module:
        return load_model(self.model, dtype="float32", device=self.device)

    def _once(self, name: str, make: Callable[[], object]) -> dict[str, float]:
        """Makes something that all runs share, unless it is there; the seconds that it took."""
        file = self.work / f"{name}.seconds.json"
        with claim(self.work / f"{name}.lock", wait=True):
            if not file.exists():
                clock = Stopwatch()
                make()
                write_json(file, clock.seconds())
        seconds: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return seconds

    def _ranks(self, model: nn.Module, base: dict[str, Tensor]) -> dict[str, Any]:
        ranks = 1.0 + self.examination.rank(model)
        first = estimate((ranks == 1).double())
        return {"first": first, **_measures({"rank": ranks}, base)}

    def _outside(self, run: Run, model: nn.Module) -> float | None:
        """The share of the change's energy outside the components' tangent spaces, if any."""
        mode = run.method.mode
        if mode not in ("kpm", "ipm") or run.method.samples != (mode,):
            return None  # made of other components, or of as many as fit each layer
        parts = components(self._model(), self.covariances(mode), mode, self.profile.rank)
        return round(share_outside(parts, changes(model, parts)), 6)

    def base(self) -> dict[str, Tensor]:
        """The untouched model's measures, item by item; from their file if there is one."""
        file = self.folder / "base.json"
        with claim(self.work / "base.lock", wait=True):
            if not file.exists():
                model = self._model()
                items = self.examination.take(model)
                found = {name: estimate(values) for name, values in items.items()}
                if self.profile.ranked:
                    items["rank"] = 1.0 + self.examination.rank(model)
                    found["rank"] = estimate(items["rank"])
                    found["first"] = estimate((items["rank"] == 1).double())
                listed = {name: values.tolist() for name, values in items.items()}
                write_json(file, {**found, "items": listed})
            read = json.loads(file.read_text(encoding="utf-8"))["items"]
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in read.items()}

    def covariances(self, sample: Sample) -> CovarianceSet:
        """What a method starts from; the same for all runs."""
        self._once(sample, partial(self._calibrate, sample))
        return CovarianceSet.load(self.work / f"{sample}.safetensors")

    def _calibrate(self, sample: Sample) -> None:
        model = self._model()
        count = self.profile.candidates if sample.endswith("++") else 1
        if sample == "task":
            apart = self._problems[: self.profile.apart]
            batches = gradient_batches(apart, self.profile.batch_size)
            found = calibrate(model, batches, sides="both", progress=False)
        else:
            batches = self._text_batches(sample, count)
            if sample == "kpm-both":
                found = calibrate(model, batches, sides="both", labels="sampled", progress=False)
            elif sample.endswith("++"):
                plan = CalibrationPlan(candidates=count, progress=False)
                (found,) = covariance_stages(model, batches, plan)
            else:
                found = calibrate(model, batches, progress=False)
        found.save(self.work / f"{sample}.safetensors")

    def _text_batches(self, sample: Sample, count: int) -> list[dict[str, Tensor]]:
        knowledge = sample.startswith("kpm")
        return token_batches(
            self.data / CALIBRATION
            if knowledge
            else plain_problems(self.data / TRAIN, self.work / TRAIN),
            load_tokenizer(self.model),
            samples=count * self.profile.samples,
            seq_len=self.profile.seq_len,
            template=QUESTION if knowledge else PROBLEM,
        )

    @property
    def training_problems(self) -> list[Item]:
        """The problems short enough to train on, but for those that starts are made of."""
        return self._problems[self.profile.apart :]

    @cached_property
    def _problems(self) -> list[Item]:
        return problems(
            self.data / TRAIN,
            load_tokenizer(self.model),
            max_tokens=self.profile.max_tokens,
            end=True,
        )

    @cached_property
    def examination(self) -> Examination:
        """What every model is measured on."""
        tokenizer = load_tokenizer(self.model)
        text = self.text or help_topics(self.work / "topics.txt")
        size = self.profile
        task = problems(self.data / TEST, tokenizer, max_tokens=size.max_tokens, end=False)
        return Examination(
            task[: size.problems],
            quiz(
                read_records(self.data / QUIZ),
                tokenizer,
                questions=size.questions,
                shots=size.shots,
            ),
            prose(text, tokenizer, samples=size.texts, length=size.text_tokens),
            size.ranked,
        )


def _measures(found: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Each measure's mean, and its change since the base, paired item by item."""
    measures = {}
    for name, values in found.items():
        change = estimate(values - base[name])
        measures[name] = estimate(values) | {
            "change": change["mean"],
            "change_se": change["se"],
        }
    return measures


def collected(folder: Path) -> dict[str, Any]:
    """All that a folder's runs have found, as one JSON-like object, in the order of the runs.

    Raises:
        DataError: the folder holds no experiment.
    """
    try:
        settings, base = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("settings.json", "base.json")
        )
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no experiment: {error.filename} is missing") from error
    base.pop("items")
    names = (field.name for field in dataclasses.fields(Profile) if field.name in settings)
    profile = Profile(**{name: settings[name] for name in names})
    runs = (
        each
        for group in profile.methods
        for run in profile.grid(group)
        for each in (run, *profile.repeats(run))
    )
    files = (folder / "runs" / f"{run.name}.json" for run in runs)
    done = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    found = {"settings": settings, "base": base, "runs": done}
    tied = {method: len(rates) for method, rates in candidates(found).items()}
    return {**found, "planned": profile.planned(tied)}
