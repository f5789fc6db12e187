"""What runs say about the claims: the best learning rate, and what is read off at a given loss."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REFERENCE = "lora"
MEASURES = ("task", "knowledge", "text")
MOST = 0.9

Run = Mapping[str, Any]
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A run at some step, not necessarily one after which it was measured.

    Attributes:
        step: of training.
        task: negative log-likelihood a token of the task's answers.
        changes: by measure, since before the training.
    """

    step: float
    task: float
    changes: Mapping[str, float]


def trajectory(run: Run, base: Mapping[str, Any]) -> list[Point]:
    """Where a run was measured, the untouched model first."""
    start = Point(0, base["task"]["mean"], dict.fromkeys(MEASURES, 0.0))
    return [start] + [
        Point(each["step"], each["task"]["mean"], {name: each[name]["change"] for name in MEASURES})
        for each in run["checkpoints"]
    ]


def when_reached(points: Sequence[Point], task: float) -> Point | None:
    """The first point at which the task's loss is `task`, or None if it never is.

    Between two measurements the loss is taken to fall in proportion to the logarithm of the step,
    and all else with it.
    """
    if points[0].task <= task:
        return points[0]
    for before, after in itertools.pairwise(points):
        if after.task <= task:
            share = (before.task - task) / (before.task - after.task)
            logarithms = math.log1p(before.step), math.log1p(after.step)
            return Point(
                math.expm1(_between(*logarithms, share)),
                task,
                {
                    name: _between(before.changes[name], after.changes[name], share)
                    for name in before.changes
                },
            )
    return None


def _between(first: float, last: float, share: float) -> float:
    return first + share * (last - first)


def broken_off(results: Results) -> list[Run]:
    """The runs whose loss was not finite at some step; nothing else is read off them."""
    return [run for run in results["runs"] if len(run["training_loss"]) < _steps(results)]


def _steps(results: Results) -> int:
    steps: int = results["settings"]["steps"]
    return steps


def by_setting(results: Results) -> dict[tuple[str, float], list[Run]]:
    """The runs by method and learning rate, each with its seeds in order."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in results["runs"]:
        if len(run["training_loss"]) == _steps(results):
            found.setdefault((run["method"], run["learning_rate"]), []).append(run)
    return found


def best(results: Results) -> dict[str, list[Run]]:
    """By method the runs with its best learning rate.

    That is the candidate with the lowest mean training loss over the last quarter of the steps,
    over the seeds that all candidates have been run with. No problem is trained on twice, so that
    this is a loss on unseen problems, and none of those that are reported.
    """
    return {method: _compared(tried)[0][0] for method, tried in candidates(results).items()}


def candidates(results: Results) -> dict[str, list[list[Run]]]:
    """By method the runs with each rate that may be its best one, the lowest loss first.

    With the seeds that all rates share, these are as good as the lowest within the share `tie`.
    """
    tie = results["settings"].get("tie", 0.0)
    rates: dict[str, list[list[Run]]] = {}
    for (method, _), runs in by_setting(results).items():
        rates.setdefault(method, []).append(runs)
    found = {method: _compared(tried) for method, tried in rates.items()}
    return {
        method: [runs for runs, loss in tried if loss <= (1 + tie) * tried[0][1]]
        for method, tried in found.items()
    }


def _compared(rates: Sequence[list[Run]]) -> list[tuple[list[Run], float]]:
    """Each rate's runs and their loss over the seeds that all of them share, the lowest first."""
    shared = set.intersection(*({run["seed"] for run in runs} for runs in rates))
    losses = [[last_loss(run) for run in runs if run["seed"] in shared] for runs in rates]
    means = [statistics.fmean(each) if each else math.inf for each in losses]
    return sorted(zip(rates, means, strict=True), key=lambda pair: pair[1])


def last_loss(run: Run) -> float:
    """Mean training loss over the last quarter of the steps."""
    losses = run["training_loss"]
    return statistics.fmean(losses[-max(1, len(losses) // 4) :])


def final_task(runs: Iterable[Run]) -> dict[int, float]:
    """The task's loss at the end, by seed."""
    return {run["seed"]: run["checkpoints"][-1]["task"]["mean"] for run in runs}


def most_of_the_fall(finals: Mapping[int, float], base: Mapping[str, Any]) -> dict[int, float]:
    """By seed the task's loss after nine tenths of the fall to the one given."""
    before = base["task"]["mean"]
    return {seed: before + MOST * (task - before) for seed, task in finals.items()}


def at(
    runs: Iterable[Run], base: Mapping[str, Any], tasks: Mapping[int, float]
) -> list[Point] | None:
    """Each run where it reaches its seed's loss; None if one of them does not."""
    points = []
    for run in runs:
        target = tasks.get(run["seed"])
        point = None if target is None else when_reached(trajectory(run, base), target)
        if point is None:
            return None
        points.append(point)
    return points
