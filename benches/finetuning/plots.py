"""Results as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from corda_kernels.outputs import atomic_path

from .comparison import Results, best, by_setting, trajectory
from .methods import METHODS

_SMOOTH = 8  # steps whose mean is drawn
_FAMILIES = {"lora": "black", "pissa": "tab:gray", "kpm": "tab:blue", "ipm": "tab:orange"}
_FAMILIES |= {"kpm++": "tab:cyan", "ipm++": "tab:red"}
_FAMILIES |= {"task": "tab:green", "white": "tab:olive", "random": "tab:pink"}
_DASHES = {"hold1": "-", "published": "--", "hold8": ":", "pair": "-.", "both": "--"}
_DASHES |= {"keep": "--", "frozen": ":"}


def draw(results: Results, folder: Path) -> None:
    """Writes convergence.svg and forgetting.svg: at the best learning rates, and at all of them."""
    # Equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "finetune", "font.size": 9}):
        _save(_convergence(results), folder / "convergence.svg")
        _save(_forgetting(results), folder / "forgetting.svg")


def _convergence(results: Results) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    training, task = figure.subplots(1, 2)
    chosen = best(results)
    for method in filter(chosen.__contains__, METHODS):
        runs = chosen[method]
        losses = _smoothed(_mean([run["training_loss"] for run in runs]))
        steps = range(_SMOOTH, _SMOOTH + len(losses))
        label = f"{method} {runs[0]['learning_rate']:.0e}".replace("e-0", "e-")
        training.plot(steps, losses, label=label, **_style(method))
        points = [trajectory(run, results["base"]) for run in runs]
        task.plot(
            [point.step for point in points[0]],
            _mean([[point.task for point in each] for each in points]),
            marker=".",
            **_style(method),
        )
    training.set(title=f"training, mean of {_SMOOTH} steps", ylabel="loss (nats a token)")
    task.set(title="test problems", ylabel="loss (nats a token)")
    for axis in (training, task):
        axis.set(xlabel="step")
    figure.legend(loc="outside right center", fontsize=7)
    return figure


def _forgetting(results: Results) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    names: dict[str, Any] = {}
    for (method, _), runs in by_setting(results).items():
        for run in runs:
            points = trajectory(run, results["base"])
            for axis, measure in zip(axes, ("knowledge", "text"), strict=True):
                (line,) = axis.plot(
                    [point.task for point in points],
                    [point.changes[measure] for point in points],
                    marker=".",
                    linewidth=0.8,
                    **_style(method),
                )
                names.setdefault(method, line)
    for axis, title in zip(axes, ("answers to questions", "prose"), strict=True):
        axis.axhline(0, color="lightgray", zorder=0)
        axis.invert_xaxis()
        axis.set(title=title, xlabel="loss on the test problems (nats a token)")
        axis.set(ylabel="change of the loss (nats a token)")
    figure.legend(names.values(), names, loc="outside right center", fontsize=7)
    return figure


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
