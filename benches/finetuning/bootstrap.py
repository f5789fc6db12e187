"""How far a method is from LoRA, and what of that is the chance of which items were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .comparison import MEASURES, MOST, Run
from .measures import decoded_changes

_SAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """A mean over items and seeds, the method's minus LoRA's, with its interval of 95 %."""

    mean: float
    low: float
    high: float


def differences(runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Difference | None]:
    """A method against LoRA, over the seeds that both were run with.

    Items are drawn with replacement, the same for both methods, all checkpoints and all seeds. In
    every sample the loss at which the methods are compared is read off anew: where the method does
    not come to nine tenths of LoRA's fall there, the least loss that it comes to.

    Args:
        runs: of a method with one learning rate.
        reference: LoRA's.

    Returns:
        "task": the loss after the last step. "knowledge" and "text": the change where the task has
        made nine tenths of LoRA's fall; None where it does not over all items.
    """
    others = {run["seed"]: run for run in reference}
    pairs = [(run, others[run["seed"]]) for run in runs if run["seed"] in others]
    if not pairs:
        return dict.fromkeys(MEASURES)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: _drawn(_changes(runs[0], name).shape[1], generator) for name in MEASURES}
    found: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    for pair in pairs:
        ours, theirs = ({n: drawn[n] @ _changes(run, n).mT for n in MEASURES} for run in pair)
        found["task"].append(ours["task"][:, -1] - theirs["task"][:, -1])
        target = MOST * theirs["task"][:, -1]
        target[1:] = target[1:].maximum(ours["task"][1:].amin(dim=1))
        for name in ("knowledge", "text"):
            at = [_when(each["task"], each[name], target) for each in (ours, theirs)]
            found[name].append(at[0] - at[1])
    return {name: _interval(torch.stack(each).mean(0)) for name, each in found.items()}


def _changes(run: Run, measure: str) -> Tensor:
    """Changes at the start, 0, and at every checkpoint, (1 + checkpoints, items)."""
    rows = [decoded_changes(each["items"][measure]) for each in run["checkpoints"]]
    return torch.stack([torch.zeros_like(rows[0]), *rows])


def _drawn(items: int, generator: torch.Generator) -> Tensor:
    """Shares of the items (1 + samples, items) in all of them, then in samples."""
    chosen = torch.randint(items, (_SAMPLES, items), generator=generator)
    counts = torch.zeros(_SAMPLES, items, dtype=torch.float64)
    counts.scatter_add_(1, chosen, torch.ones_like(counts))
    return torch.cat([torch.ones(1, items, dtype=torch.float64), counts]) / items


def _when(task: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """(samples,) the values (samples, points) where the task first is at its target, else NaN.

    As in `when_reached`, all is taken to go in proportion to the task between two points.
    """
    reached = task <= target[:, None]
    index = reached.int().argmax(dim=1).clamp(min=1)[:, None]
    before, after = (task.gather(1, index - shift)[:, 0] for shift in (1, 0))
    first, last = (values.gather(1, index - shift)[:, 0] for shift in (1, 0))
    at = first + (before - target) / (before - after) * (last - first)
    return torch.where(reached.any(dim=1), at, torch.nan)


def _interval(values: Tensor) -> Difference | None:
    mean, samples = float(values[0]), values[1:]
    if mean != mean:
        return None
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return Difference(mean, low, high)
