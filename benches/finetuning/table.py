"""Results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .comparison import (
    REFERENCE,
    Point,
    Results,
    Run,
    at,
    best,
    broken_off,
    by_setting,
    final_task,
    most_of_the_fall,
)

_HEADINGS = (
    "start",
    "learning rate",
    "runs",
    "task",
    "steps to LoRA's",
    "to 9/10",
    "knowledge",
    "at 9/10",
    "prose",
    "at 9/10",
    "rank of answer",
)


def table(results: Results) -> str:
    """The methods at their best learning rates, with what has been run in the lines above.

    Args:
        results: what `collected` gives, or finetune.json.
    """
    chosen = best(results)
    rows = [_row(results, runs, chosen) for runs in chosen.values()]
    return f"{summary(results)}\n\n{markdown(rows)}"


def grid(results: Results) -> str:
    """All learning rates of all methods, in the columns of `table`."""
    chosen = best(results)
    methods = list(chosen)
    found = sorted(
        by_setting(results).items(), key=lambda item: (methods.index(item[0][0]), item[0][1])
    )
    return markdown([_row(results, runs, chosen) for _, runs in found])


def forms(results: Results) -> str:
    """The forms in which one adapter can be trained, after the last step."""
    settings, base = results["settings"], results["base"]
    rows = []
    for run in results["runs"]:
        last, outside = run["checkpoints"][-1], run["outside"]
        rows.append(
            [
                run["method"],
                rate(run),
                f"{run['trainable']:,}",
                f"{last['task']['mean']:.3f}",
                f"{last['knowledge']['change']:+.3f}",
                f"{last['text']['change']:+.3f}",
                "–" if outside is None else f"{outside:.2g}",
            ]
        )
    errors = {
        name: statistics.median(
            run["checkpoints"][-1][name]["change_se"] for run in results["runs"]
        )
        for name in ("knowledge", "text")
    }
    about = (
        f"{settings['model']}, {settings['rank']} components of every layer, {settings['steps']} "
        f"steps of {settings['batch_size']} problems, one seed. Negative log-likelihood a token in "
        "nats; knowledge and prose are changes since before the training, where the task was at "
        f"{base['task']['mean']:.3f}. Their standard errors, median over the runs, are "
        f"{errors['knowledge']:.3f} over {settings['questions']} questions and "
        f"{errors['text']:.3f} over {settings['texts']} pieces of prose. Outside: the share of the "
        "change's energy that does not lie in the components' tangent spaces."
    )
    header = ("start", "learning rate", "trained", "task", "knowledge", "prose", "outside")
    return f"{about}\n\n{markdown(rows, header)}"


def summary(results: Results) -> str:
    """What was run and what the columns are, as one paragraph."""
    settings, base = results["settings"], results["base"]
    runs = [run for setting in by_setting(results).values() for run in setting]
    broken = ", ".join(f"{run['method']} {rate(run)}" for run in broken_off(results))
    errors = {
        name: statistics.median(run["checkpoints"][-1][name]["change_se"] for run in runs)
        for name in ("knowledge", "text")
    }
    errors["rank"] = statistics.median(run["rank"]["change_se"] for run in runs)
    return (
        f"{len(results['runs'])} of {results['planned']} runs (profile {settings['profile']}): "
        f"{settings['model']}, rank {settings['rank']}, {settings['steps']} steps of "
        f"{settings['batch_size']} problems. `task` is the final loss, the negative log-likelihood "
        f"in nats a token ({base['task']['mean']:.3f} before training). `knowledge` and `prose` "
        f"are changes of that loss on other text (from {base['knowledge']['mean']:.3f} and "
        f"{base['text']['mean']:.3f}): above 0 means forgotten. `rank of answer` is the change of "
        f"the right answer's rank among ten (from {base['rank']['mean']:.2f}). `steps to LoRA's` "
        "counts steps to LoRA's final loss, `to 9/10` steps to nine tenths of LoRA's fall, and `at "
        "9/10` is what was forgotten there; – means never. Each learning rate ran with one seed, "
        "the best one with `runs` seeds, over which ± is the standard deviation. Median standard "
        f"errors of a change: {errors['knowledge']:.3f} over {settings['questions']} questions, "
        f"{errors['text']:.3f} over {settings['texts']} pieces of prose, {errors['rank']:.2f} over "
        f"{settings['ranked']} ranks."
        + f" Runs whose loss ceased to be finite: {broken}."
        * bool(broken)
    )


def rate(run: Run) -> str:
    return f"{run['learning_rate']:.0e}".replace("e-0", "e-")


def _row(results: Results, runs: Sequence[Run], chosen: dict[str, list[Run]]) -> list[str]:
    base = results["base"]
    last = [run["checkpoints"][-1] for run in runs]
    reference = final_task(chosen.get(REFERENCE, []))
    reached = at(runs, base, reference)
    equal = at(runs, base, most_of_the_fall(reference, base))

    def change(measure: str) -> str:
        return spread((each[measure]["change"] for each in last), "+.3f")

    def change_at_equal(measure: str) -> str:
        if equal is None:
            return "–"
        return spread((point.changes[measure] for point in equal), "+.3f")

    def steps(points: Sequence[Point] | None) -> str:
        return "–" if points is None else spread((point.step for point in points), ".0f")

    return [
        runs[0]["method"],
        rate(runs[0]),
        str(len(runs)),
        spread((each["task"]["mean"] for each in last), ".3f"),
        steps(reached),
        steps(equal),
        change("knowledge"),
        change_at_equal("knowledge"),
        change("text"),
        change_at_equal("text"),
        spread((run["rank"]["change"] for run in runs), "+.2f"),
    ]


def spread(values: Iterable[float], form: str) -> str:
    """Mean, and with several values their standard deviation."""
    found = list(values)
    mean = f"{statistics.fmean(found):{form}}"
    if len(found) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(found):{form.lstrip('+')}}"


def markdown(rows: Iterable[Sequence[str]], header: Sequence[str] = _HEADINGS) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
