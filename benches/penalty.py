"""What the penalties do to forgetting: one adapter trained with and without each, on a real model.

    python benches/penalty.py run MODEL DATA FOLDER
    python benches/penalty.py report FOLDER OUT

DATA is the folder that `benches/finetune.py` describes; training and measures are its own. A
penalty's strength is given as what its value at the end of the run without penalty would have added
to the loss, in nats. Each run is a file; those that are done stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetuning.data import training_batches
from finetuning.experiment import Experiment
from finetuning.measures import estimate
from finetuning.methods import METHODS, start
from finetuning.profiles import Profile
from finetuning.training import train
from torch import Tensor

from corda_kernels import CompactnessPenalty, DriftPenalty, load_model
from corda_kernels.bench.timing import environment
from corda_kernels.files import write_json

STRENGTHS = (1.0, 0.1)
PENALTIES: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "drift": DriftPenalty,
    "compactness": CompactnessPenalty,
}
# What is trained, at which learning rate, and what it is tried with. At 3e-3 LoRA forgets.
TRAININGS = {
    ("lora", 3e-3): ("drift",),
    ("kpm-hold1", 3e-3): ("drift",),
    ("kpm-published", 3e-4): ("drift", "compactness"),
}
PROFILE = Profile(
    methods=(("lora", "kpm-hold1", "kpm-published"),),
    learning_rates=1,
    seeds=1,
    rank=32,
    steps=20,
    batch_size=2,
    max_tokens=128,
    checkpoints=(20,),
    problems=24,
    questions=64,
    shots=4,
    texts=8,
    text_tokens=128,
    samples=16,
    seq_len=512,
)
MEASURES = ("task", "knowledge", "text")


@dataclass(frozen=True)
class Run:
    """One training; the one without penalty gives the others their unit."""

    method: str
    learning_rate: float
    penalty: str | None = None
    strength: float = 0.0

    @property
    def name(self) -> str:
        parts = [self.method, f"lr{self.learning_rate:.0e}"]
        return "-".join(parts + ([self.penalty, f"{self.strength:g}"] if self.penalty else []))


# What tells most comes first.
RUNS = [Run(*training) for training in TRAININGS] + [
    Run(*training, penalty, strength)
    for strength in STRENGTHS
    for training, penalties in TRAININGS.items()
    for penalty in penalties
]


def result_file(folder: Path, run: Run) -> Path:
    return folder / "runs" / f"{run.name}.json"


def do(experiment: Experiment, run: Run) -> None:
    """Trains, measures, and writes the run's file."""
    base = experiment.base()
    covariances = experiment.covariances("kpm")
    model = start(
        METHODS[run.method],
        load_model(experiment.model, dtype="float32"),
        rank=PROFILE.rank,
        seed=0,
        covariances=experiment.covariances,
    )
    of_training = TRAININGS[run.method, run.learning_rate]
    penalties = {name: PENALTIES[name](model, covariances) for name in of_training}
    factor, added = 0.0, None
    if run.penalty is not None:
        unpenalised = Run(run.method, run.learning_rate)
        plain = json.loads(result_file(experiment.folder, unpenalised).read_text())
        factor = run.strength / plain["penalties"][run.penalty]
        penalty = penalties[run.penalty]

        def added() -> Tensor:
            return factor * penalty()

    batches = training_batches(
        experiment.training_problems, steps=PROFILE.steps, size=PROFILE.batch_size, seed=0
    )
    losses = train(model, batches, run.learning_rate, penalty=added)
    found = experiment.examination.take(model)
    result: dict[str, Any] = {
        "method": run.method,
        "learning_rate": run.learning_rate,
        "penalty": run.penalty,
        "strength": run.strength,
        "factor": factor,
        "training_loss": [round(loss, 6) for loss in losses],
        "penalties": {name: penalty().item() for name, penalty in penalties.items()},
        "environment": environment(torch.device("cpu")),
    }
    for name in MEASURES:
        change = estimate(found[name] - base[name])
        result[name] = estimate(found[name]) | {"change": change["mean"], "change_se": change["se"]}
    write_json(result_file(experiment.folder, run), result)
    print(run.name, {name: result[name]["mean"] for name in MEASURES}, flush=True)


def report(folder: Path, out: Path) -> None:
    """Writes OUT.json and OUT.txt from the runs that are done."""
    base = json.loads((folder / "base.json").read_text())
    order = list(TRAININGS)
    ordered = sorted(RUNS, key=lambda run: (order.index((run.method, run.learning_rate)), run.name))
    files = [result_file(folder, run) for run in ordered]
    runs = [json.loads(file.read_text()) for file in files if file.exists()]
    described = runs[0]["environment"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in described.items()),
        f"SmolLM2-135M, rank {PROFILE.rank}, {PROFILE.steps} steps of {PROFILE.batch_size} "
        "problems of GSM8K, one seed; nats a token: task "
        "gsm8k_test, knowledge few-shot nq_open_efficientqa_dev, text Python's help topics",
        "in brackets the change since the base with the standard error of its mean over items; "
        "drift and compactness at the end",
        f"{'method':14}{'rate':>6}  {'penalty':13}{'strength':>8}"
        + "".join(f"{name:>26}" for name in MEASURES)
        + f"{'drift':>10}{'compactness':>13}",
        f"{'base':43}" + "".join(f"{base[name]['mean']:26.3f}" for name in MEASURES),
    ]
    for run in runs:
        cells = [
            f"{run[name]['mean']:.3f} ({run[name]['change']:+.3f} ± {run[name]['change_se']:.3f})"
            for name in MEASURES
        ]
        values = [run["penalties"].get(name) for name in PENALTIES]
        drift, compactness = ("-" if value is None else f"{value:.3g}" for value in values)
        strength = f"{run['strength']:g}" if run["penalty"] else ""
        lines.append(
            f"{run['method']:14}{run['learning_rate']:6g}  "
            f"{run['penalty'] or 'none':13}{strength:>8}"
            + "".join(f"{cell:>26}" for cell in cells)
            + f"{drift:>10}{compactness:>13}"
        )
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base.pop("items")
    write_json(out.with_suffix(".json"), {"base": base, "runs": runs})
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("model")
    runs.add_argument("data", type=Path)
    runs.add_argument("folder", type=Path)
    table = commands.add_parser("report")
    table.add_argument("folder", type=Path)
    table.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(arguments.folder, arguments.out)
        return
    experiment = Experiment(
        arguments.model, arguments.data, arguments.folder, "penalty", PROFILE, None
    )
    for run in RUNS:
        if not result_file(arguments.folder, run).exists():
            do(experiment, run)


if __name__ == "__main__":
    main()
