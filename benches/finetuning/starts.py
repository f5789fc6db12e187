"""The tables of the starts that know the task: what they gain, and what is forgotten by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .bootstrap import Difference, differences
from .comparison import (
    REFERENCE,
    Point,
    Results,
    Run,
    at,
    best,
    broken_off,
    by_setting,
    candidates,
    final_task,
    last_loss,
    most_of_the_fall,
)
from .table import markdown, rate, spread

_TASK = (
    "start",
    "rate",
    "runs",
    "trained",
    "training loss",
    "task",
    "− LoRA's",
    "steps",
    "seconds",
)
_KEPT = ("start", "rate", "steps", "knowledge", "− LoRA's", "prose", "− LoRA's")
_DIRECT = ("start", "against", "steps", "its steps", "knowledge", "its knowledge", "difference")
# A start and its control, or the simpler one of two.
_PAIRS = (("kpm-hold1", "random"), ("kpm-both", "kpm-hold1"), ("task-keep", "white"))


def starts(results: Results) -> str:
    """The task, what is forgotten at equal loss, and direct comparisons, with a legend above."""
    chosen = best(results)
    reference = chosen.get(REFERENCE, [])
    task = [_task(results, runs, reference) for runs in chosen.values()]
    kept = [_kept(results, runs, reference) for runs in chosen.values()]
    direct = [_direct(results, *pair) for pair in _pairs(results)]
    tables = [markdown(task, _TASK), markdown(kept, _KEPT), markdown(direct, _DIRECT)]
    return "\n\n".join([_about(results), *tables])


def _pairs(results: Results) -> list[tuple[list[Run], list[Run]]]:
    """What is compared directly: those above, and LoRA and `task-keep` with LoRA's other rates."""
    chosen = best(results)
    pairs = [(chosen[name], chosen[to]) for name, to in _PAIRS if {name, to} <= chosen.keys()]
    tried = candidates(results).get(REFERENCE, [])
    others = [runs for runs in tried if rate(runs[0]) != rate(chosen[REFERENCE][0])]
    return pairs + [
        (chosen[name], runs)
        for runs in others
        for name in (REFERENCE, "task-keep")
        if name in chosen
    ]


def _direct(results: Results, runs: Sequence[Run], reference: Sequence[Run]) -> list[str]:
    """A row of a start against another in LoRA's place, over the seeds that both have."""
    base, seeds = results["base"], {run["seed"] for run in reference}
    targets = most_of_the_fall(final_task(reference), base)
    ours = at([run for run in runs if run["seed"] in seeds], base, targets)
    theirs = at(reference, base, targets)

    def shown(form: str, value: Callable[[Point], float]) -> list[str]:
        return [spread(map(value, each), form) if each else "–" for each in (ours, theirs)]

    return [
        f"{runs[0]['method']} {rate(runs[0])}",
        f"{reference[0]['method']} {rate(reference[0])}",
        *shown(".0f", lambda point: point.step),
        *shown("+.3f", lambda point: point.changes["knowledge"]),
        _against(runs, reference, "knowledge"),
    ]


def rates(results: Results) -> str:
    """Both tables at all rates, each against LoRA at its best one."""
    chosen = best(results)
    reference, methods = chosen.get(REFERENCE, []), list(chosen)
    found = sorted(
        by_setting(results).items(), key=lambda item: (methods.index(item[0][0]), item[0][1])
    )
    task = [_task(results, runs, reference) for _, runs in found]
    kept = [_kept(results, runs, reference) for _, runs in found]
    return f"{markdown(task, _TASK)}\n\n{markdown(kept, _KEPT)}"


def _about(results: Results) -> str:
    settings, base = results["settings"], results["base"]
    broken = ", ".join(f"{run['method']} {rate(run)}" for run in broken_off(results))
    kind = "CPU seconds" if settings["device"] == "cpu" else "seconds"
    return (
        f"{len(results['runs'])} of {results['planned']} runs (profile {settings['profile']}): "
        f"{settings['model']}, {settings['steps']} steps of {settings['batch_size']} problems, "
        f"LoRA of rank {2 * settings['rank']}. Negative log-likelihood a token in nats: the "
        "training loss of the last quarter of the steps, by which the rate was chosen (rates that "
        f"were within {settings['tie']:.0%} of the lowest with the first seed were compared over "
        "all seeds); the task "
        f"after the last step, over {settings['problems']} test problems; knowledge "
        f"({settings['questions']} questions) and prose ({settings['texts']} pieces) as changes "
        "since before the training, where the task was at "
        f"{base['task']['mean']:.3f}, knowledge at {base['knowledge']['mean']:.3f} and prose at "
        f"{base['text']['mean']:.3f}. ± is the standard deviation over seeds, in brackets stands "
        "the interval of 95 % of a paired bootstrap over items. Steps and "
        f"{kind}, calibration and decomposition included, are until the task is at LoRA's final "
        "loss; in the second table all is read off where the task has made nine tenths of LoRA's "
        "fall, – where it never has. The third table has the same of two starts, at nine tenths "
        'of the fall of the one after "against".'
        + f" Runs whose loss ceased to be finite: {broken}."
        * bool(broken)
    )


def _task(results: Results, runs: Sequence[Run], reference: Sequence[Run]) -> list[str]:
    reached = at(runs, results["base"], final_task(reference))
    kind = "cpu" if results["settings"]["device"] == "cpu" else "wall"
    seconds = [
        run["seconds"]["start"][kind]
        + point.step * run["seconds"]["training"][kind] / len(run["training_loss"])
        for run, point in zip(runs, reached or [], strict=bool(reached))
    ]
    return [
        runs[0]["method"],
        rate(runs[0]),
        str(len(runs)),
        f"{runs[0]['trainable']:,}",
        spread(map(last_loss, runs), ".3f"),
        spread(final_task(runs).values(), ".3f"),
        _against(runs, reference, "task"),
        "–" if reached is None else spread((point.step for point in reached), ".0f"),
        "–" if reached is None else spread(seconds, ".0f"),
    ]


def _kept(results: Results, runs: Sequence[Run], reference: Sequence[Run]) -> list[str]:
    base = results["base"]
    equal = at(runs, base, most_of_the_fall(final_task(reference), base))

    def change(measure: str) -> str:
        return "–" if equal is None else spread((e.changes[measure] for e in equal), "+.3f")

    return [
        runs[0]["method"],
        rate(runs[0]),
        "–" if equal is None else spread((point.step for point in equal), ".0f"),
        change("knowledge"),
        _against(runs, reference, "knowledge"),
        change("text"),
        _against(runs, reference, "text"),
    ]


def _against(runs: Sequence[Run], reference: Sequence[Run], measure: str) -> str:
    found: Difference | None = differences(runs, reference)[measure]
    if found is None or runs is reference:
        return "–"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
