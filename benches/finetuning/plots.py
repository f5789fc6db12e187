"""Results as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from corda_kernels.outputs import atomic_path

from .comparison import Results, Run, best, trajectory
from .methods import METHODS

_SMOOTH = 8  # steps whose mean is drawn
_FAMILIES = {"lora": "black", "pissa": "tab:gray", "kpm": "tab:blue", "ipm": "tab:orange"}
_FAMILIES |= {"kpm++": "tab:cyan", "ipm++": "tab:red"}
_FAMILIES |= {"task": "tab:green", "white": "tab:olive", "random": "tab:pink"}
_DASHES = {"hold1": "-", "published": "--", "hold8": ":", "pair": "-.", "both": "--"}
_DASHES |= {"keep": "--", "frozen": ":"}


def draw(results: Results, folder: Path) -> None:
    """Writes convergence.svg and forgetting.svg: means over the seeds, at the best rates."""
    # Equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "finetune", "font.size": 9}):
        _save(_convergence(results), folder / "convergence.svg")
        _save(_forgetting(results), folder / "forgetting.svg")


def _convergence(results: Results) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    training, task = figure.subplots(1, 2)
    for label, style, runs in _methods(results):
        losses = _smoothed(_mean([run["training_loss"] for run in runs]))
        training.plot(range(_SMOOTH, _SMOOTH + len(losses)), losses, label=label, **style)
        points = [trajectory(run, results["base"]) for run in runs]
        steps = [point.step for point in points[0]]
        losses = _mean([[point.task for point in each] for each in points])
        task.plot(steps, losses, marker=".", **style)
    training.set(title=f"training, mean of {_SMOOTH} steps", ylabel="loss (nats a token)")
    task.set(title="test problems", ylabel="loss (nats a token)")
    for axis in (training, task):
        axis.set(xlabel="step")
    figure.legend(loc="outside right center", fontsize=7)
    return figure


def _forgetting(results: Results) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for label, style, runs in _methods(results):
        points = [trajectory(run, results["base"]) for run in runs]
        losses = _mean([[point.task for point in each] for each in points])
        for axis, measure in zip(axes, ("knowledge", "text"), strict=True):
            changes = _mean([[point.changes[measure] for point in each] for each in points])
            # Both axes have the same lines: one of them gives the legend.
            named = {"label": label} if measure == "text" else {}
            axis.plot(losses, changes, marker=".", **named, **style)
    for axis, title in zip(axes, ("answers to questions", "prose"), strict=True):
        axis.axhline(0, color="lightgray", zorder=0)
        axis.invert_xaxis()
        axis.set(title=title, xlabel="loss on the test problems (nats a token)")
        axis.set(ylabel="change of the loss (nats a token)")
    figure.legend(loc="outside right center", fontsize=7)
    return figure


def _methods(results: Results) -> Iterator[tuple[str, dict[str, Any], list[Run]]]:
    """Of each method its label, the style of its lines, and the runs at its best rate."""
    chosen = best(results)
    for method in filter(chosen.__contains__, METHODS):
        rate = f"{chosen[method][0]['learning_rate']:.0e}".replace("e-0", "e-")
        yield f"{method} {rate}", _style(method), chosen[method]


def _style(method: str) -> dict[str, Any]:
    family, _, variant = method.partition("-")
    return {"color": _FAMILIES[family], "linestyle": _DASHES.get(variant, "-")}


def _mean(series: Sequence[Sequence[float]]) -> list[float]:
    """The mean of several runs at each of their points."""
    return [statistics.fmean(values) for values in zip(*series, strict=True)]


def _smoothed(losses: Sequence[float]) -> list[float]:
    return [
        statistics.fmean(losses[first : first + _SMOOTH])
        for first in range(max(0, len(losses) - _SMOOTH + 1))
    ]


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
