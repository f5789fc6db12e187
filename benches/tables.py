"""Tables in Markdown of what benchmarks wrote, each from the JSON of one or more result files."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from cells import (
    EMPTY,
    Results,
    end_error,
    markdown,
    measured_on,
    mebibytes,
    model_name,
    notes,
    ratio,
    relative,
    seconds,
)

_CALLED = {
    "addmm": "torch.addmm",
    "published": "PEFT",
    "svd_lowrank": "torch.svd_lowrank",
    "ours": "corda_kernels",
    "peft": "PEFT CorDA",
    "pissa": "PEFT PiSSA",
    "eva": "PEFT EVA",
}
_BATCHED = {
    "gram": "Gram matrix, float64",
    "linalg.svd": "torch.linalg.svd",
    "cuda": "corda_kernels",
}
_MODE = {"largest": "IPM", "smallest": "KPM"}
_STAGES = ("forward", "covariance", "decomposition", "attaching")


def speed(covariance: Results, svd: Results, accuracy: Results, *adapters: Results) -> str:
    """What a reader wants to know first: here against the baseline, with the errors of both."""
    rows = [*_widest_covariance(covariance), *_whole_model(svd, accuracy)]
    rows += [row for pipeline in adapters for row in _adapter(pipeline)]
    header = ("", "baseline", "error", "here", "error", "times as fast")
    about = [
        f"{svd['rows'][0]['case']}. Errors are relative to float64: of C for the covariance, of "
        "B·A for IPM; for KPM the norm of UᵀWC over the least possible, where 1 is exact. Ours are "
        "the worst of all layers, PEFT's the worst of a sample.",
        f"Decompositions: {measured_on(svd)}",
        f"Other rows: {measured_on(covariance, *adapters)}",
    ]
    return markdown(header, rows) + notes(*about)


def gpu_speed(covariance: Results, svd: Results) -> str:
    """The same for a GPU: the widest covariances and a large model's layers."""
    rows = []
    for dtype in ("bfloat16", "float32"):
        cases = [row for row in covariance["syrk"] if row["dtype"] == dtype]
        widest = max(row["channels"] for row in cases)
        found = {row["backend"]: row for row in cases if row["channels"] == widest}
        base, ours = found["addmm"], found["triton"]
        rows.append(
            [
                f"covariance of {base['tokens']} × {widest} {dtype}, with statistics",
                f"torch.addmm {seconds(base['timing'])}",
                seconds(ours["timing"]),
                ratio(ours["speedup"]),
            ]
        )
    rows += [
        [
            f"{_MODE[row['which']]}: decomposition of LLaMA-2-7B's {row['layers']} layers, "
            f"r = {row['rank']}",
            EMPTY,
            seconds(row["timing"]),
            EMPTY,
        ]
        for row in svd["rows"]
    ]
    header = ("", "baseline", "here", "times as fast")
    return markdown(header, rows) + notes(measured_on(covariance, svd))


def _widest_covariance(results: Results) -> list[list[str]]:
    cases = [row for row in results["syrk"] if row["dtype"] == "float32"]
    widest = max(row["channels"] for row in cases)
    found = {row["backend"]: row for row in cases if row["channels"] == widest}
    base = found["addmm"]
    if "cpu" not in found:
        return []
    return [
        [
            f"covariance of {base['tokens']} × {widest}, with statistics",
            f"torch.addmm {seconds(base['timing'])}",
            relative(base["error"]),
            seconds(found["cpu"]["timing"]),
            relative(found["cpu"]["error"]),
            ratio(found["cpu"]["speedup"]),
        ]
    ]


def _whole_model(results: Results, accuracy: Results) -> list[list[str]]:
    found = {(row["method"], row["which"]): row for row in results["rows"]}
    damped = next((run for run in accuracy["runs"] if run["damping"]), None)
    rows = []
    for which, mode in _MODE.items():
        peft, ours = found["published", which], found["ours", which]
        error = ours["error"]
        if damped:  # of all layers rather than of a sample; None where one was not finite
            worst = damped["top" if which == "largest" else "energy"]
            error = max(error or 0, math.inf if worst is None else worst)
        rows.append(
            [
                f"{mode}: decomposition of {ours['layers']} layers, r = {ours['rank']}",
                f"PEFT {seconds(peft['timing'])}",
                end_error(which, peft["error"]),
                seconds(ours["timing"]),
                end_error(which, error),
                ratio(ours["speedup"]),
            ]
        )
    return rows


def _adapter(results: Results) -> list[list[str]]:
    found = {row["name"]: row for row in results["pipeline"]}
    peft, task = found["peft"], results["task"]
    names = {"init_corda": "from {} tokens to the adapter", "patch_peft": "the same by patch_peft"}
    return [
        [
            f"{task['mode'].upper()}: {called.format(task['tokens'])}",
            f"PEFT {peft['seconds']:.1f} s, {mebibytes(peft['growth'])}",
            EMPTY,
            f"{found[name]['seconds']:.1f} s, {mebibytes(found[name]['growth'])}",
            EMPTY,
            ratio(peft["seconds"] / found[name]["seconds"]),
        ]
        for name, called in names.items()
        if name in found
    ]


def covariances(*results: Results) -> str:
    """C += XᵀX of every backend beside torch.addmm, a case a row."""
    cases: dict[str, dict[str, Any]] = {}
    for row in (row for each in results for row in each["syrk"]):
        case = f"{row['tokens']} × {row['channels']} {row['dtype']}"
        cases.setdefault(case, {})[row["backend"]] = row
    rows = []
    for case, found in cases.items():
        base, plain = found.pop("addmm"), found.pop("reference")
        for backend, ours in found.items():
            # A baseline that is wrong was not always left untimed.
            faster = None if base["timing"] is None else ours["speedup"]
            cells = (_timed(base), _timed(plain), _timed(ours))
            name = case if len(found) == 1 else f"{case}, {backend}"
            rows.append([name, *itertools.chain(*cells), ratio(faster)])
    names = ("torch.addmm", "plain torch", "corda_kernels")
    header = ("tokens × channels", *itertools.chain(*((name, "error") for name in names)))
    header = (*header, "times as fast")
    calibrations = [
        f"Calibration of {model_name(timed['model'])} on {timed['tokens']} tokens: "
        f"{timed['calibration']['p50']:.1f} s, the bare forward pass {timed['forward']['p50']:.1f} "
        f"s, ratio {timed['ratio']:.2f}."
        for each in results
        if (timed := each.get("calibration"))
    ]
    return markdown(header, rows) + notes(measured_on(*results), *calibrations)


def _timed(row: Results) -> tuple[str, str]:
    """The time and the error of a method; no time where it is wrong."""
    right = row["timing"] is not None and row.get("passed", True)
    return seconds(row["timing"]), relative(row["error"]) + ("" if right else ", wrong")


def decompositions(*results: Results) -> str:
    """Both ends by every method; a method whose error is too large has no speed."""
    rows = [
        [
            f"{row['case']}, r = {row['rank']}",
            _MODE[row["which"]],
            _CALLED.get(row["method"], row["method"]),
            seconds(row["timing"]),
            ratio(row["speedup"]),
            end_error(row["which"], row["error"]) + ("" if row["passed"] else ", wrong"),
        ]
        for each in results
        for row in each["rows"]
    ]
    memory = [
        f"{grown['case']} {_MODE[grown['which']]} {mebibytes(grown['grown'])}"
        for each in results
        for grown in each.get("memory", ())
    ]
    header = ("layers", "mode", "", "time", "times as fast as PEFT", "error")
    about = [measured_on(*results)]
    if memory:
        about.append(f"Memory beyond the inputs: {', '.join(memory)}.")
    return markdown(header, rows, text=3) + notes(*about)


def accuracies(results: Results) -> str:
    """The worst layer of a model, with and without damping."""
    rows = [
        [
            f"{run['damping']:g}",
            f"{run['condition'][0]:.0e} to {run['condition'][1]:.0e}",
            *(
                "not finite" if run[key] is None else end_error(which, run[key])
                for key, which in (("top", "largest"), ("energy", "smallest"))
            ),
            EMPTY if run["bottom"] is None else relative(run["bottom"]),
        ]
        for run in results["runs"]
    ]
    header = (
        "damping",
        "cond(WC)",
        "IPM, error of B·A",
        "KPM, norm over the least",
        f"KPM, error of B·A at gaps of {results['least_gap']:.0%}",
    )
    layers = {len(run["layers"]) for run in results["runs"]}
    model = model_name(results["model"])
    about = f"The worst of {max(layers)} layers of {model}, r = {results['rank']}."
    return markdown(header, rows) + notes(about, measured_on(results))


def reconstructions(*results: Results) -> str:
    """B A by the published formula, by an inverse of C and by projection, in two precisions."""
    parts = []
    for each in results:
        (first, *_), *_ = each["errors"].values()
        columns = [
            (dtype, method)
            for dtype, found in next(iter(first.values())).items()
            for method in found
        ]
        rows = [
            [f"{end}, {name}", *(_spread([one[end][a][b] for one in layers]) for a, b in columns)]
            for end in first
            for name, layers in each["errors"].items()
        ]
        header = ("", *(f"{dtype} {method}" for dtype, method in columns))
        parts.append(markdown(header, rows) + notes(f"{each['title']}.", measured_on(each)))
    return "\n\n".join(parts)


def _spread(errors: Sequence[float | None]) -> str:
    """The median and, of more than one, the worst."""
    known = [math.nan if error is None else error for error in errors]
    worst = f" ({max(known):.0e})" if len(known) > 1 else ""
    return f"{statistics.median(known):.0e}{worst}"


def pipelines(*results: Results) -> str:
    """From tokens to the adapter, by stage."""
    rows = []
    modes = {each["task"]["mode"] for each in results}
    for each in results:
        peft = next((row for row in each["pipeline"] if row["name"] == "peft"), None)
        mode = f"{each['task']['mode'].upper()}: " if len(modes) > 1 else ""
        for row in each["pipeline"]:
            name = mode + _CALLED.get(row["name"], row["name"])
            if not row["passed"]:
                rows.append([name, "computes something else: no speed", *[EMPTY] * 9])
                continue
            stages = row.get("stages") or {"forward": row["forward"]}
            cells = [f"{stages[stage]:.1f}" if stage in stages else EMPTY for stage in _STAGES]
            faster, beyond, growth = EMPTY, EMPTY, EMPTY
            if peft:
                faster = ratio(peft["seconds"] / row["seconds"])
                if row["forward"] and row["beyond"] > 0:
                    beyond = ratio(peft["beyond"] / row["beyond"])
                growth = ratio(row["growth"] / peft["growth"]) if peft["growth"] else EMPTY
            overlap = EMPTY if row["overlap"] is None else f"{row['overlap']:.6f}"
            memory = [mebibytes(row["growth"]), growth]
            rows.append([name, f"{row['seconds']:.1f}", *cells, faster, beyond, *memory, overlap])
    header = ("", "seconds", *_STAGES, "times as fast", "beyond", "memory", "of PEFT's", "overlap")
    tasks = dict.fromkeys(
        f"{model_name(task['model'])}, {task['mode'].upper()}, rank {task['rank']}, "
        f"{task['tokens']} tokens."
        for task in (each["task"] for each in results)
    )
    runs = [
        f"{_CALLED.get(row['name'], row['name'])} {', '.join(f'{run:.1f}' for run in row['runs'])}"
        for each in results
        for row in each["pipeline"]
        if len(row.get("runs", ())) > 1
    ]
    spread = (
        f"All runs, of which each row is the median (the slower of two): {'; '.join(runs)} s."
        if runs
        else ""
    )
    return markdown(header, rows) + notes(*tasks, spread, measured_on(*results))


def batched(results: Results) -> str:
    """U and S of many small matrices, a case a row."""
    cases: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        case = f"{row['batch']} of {row['size']} × {row['size']} {row['dtype']}"
        cases.setdefault(case, {})[row["method"]] = row
    rows = [
        [
            case,
            *itertools.chain(*(_timed(found[method]) for method in _BATCHED)),
            ratio(found["cuda"]["speedup"]),
        ]
        for case, found in cases.items()
    ]
    names = itertools.chain(*((name, "error") for name in _BATCHED.values()))
    return markdown(("matrices", *names, "times as fast"), rows) + notes(measured_on(results))


def end_to_end(results: Results) -> str:
    """A random model of a large shape, part by part."""
    rows = [
        [part, f"{found['seconds']:.1f} s", mebibytes(found["growth"])]
        for part, found in results["parts"].items()
    ]
    return markdown(("", "seconds", "memory beyond the weights"), rows) + notes(
        f"{results['layers']} layers of width {results['hidden']} in {results['dtype']}, "
        f"{mebibytes(results['weight_bytes'])} of random weights; {results['tokens']} tokens; "
        f"{results['mode'].upper()}, rank {results['rank']}; covariances "
        f"{mebibytes(results['covariance_bytes'])}, {results['way']}.",
        measured_on(results),
    )


def selections(results: Results) -> str:
    """Candidates scored and a budget shared out, against the procedure as it is written down."""
    literal = sum(results["literal"])
    total = literal + results["loop"]
    spent = results["selection"] + results["allocation"]
    rows = [
        ["scores of all candidates", f"{literal:.1f} s", f"{results['selection']:.1f} s"],
        [
            "ranks, here with the spectra of the chosen candidates",
            f"{results['loop']:.1f} s",
            f"{results['allocation']:.1f} s",
        ],
        ["both", f"{total:.1f} s", f"{spent:.1f} s"],
    ]
    header = ("", "as published, by full float64 SVDs", "corda_kernels")
    layers = len(results["ranks"])
    return markdown(header, rows) + notes(
        f"{ratio(results['ratio'])} times as fast. {results['right']} of {layers} layers choose "
        f"the same candidate, and scores differ by at most {relative(results['error'])}.",
        measured_on(results),
    )


def first_steps(results: Results) -> str:
    """How far the first step of the plain form is from the pair's."""
    keys = ("all", "median", "worst")
    rows = [
        [row["mode"].upper(), row["optimiser"], *(f"{row[key]:.2%}" for key in keys)]
        for row in results["rows"]
    ]
    header = ("", "optimiser", "all layers", "median layer", "worst layer")
    return markdown(header, rows, text=2) + notes(measured_on(results))


def gradients(results: Results) -> str:
    """What starts from gradients hold, against dense SVDs."""
    names = {
        "task": "task start",
        "largest": "two-sided, largest",
        "smallest": "two-sided, smallest",
    }
    accuracy = results["accuracy"]
    rows = [
        [
            names[kind],
            f"{len(accuracy['layers'])}",
            f"{worst['energy']:.1e}",
            f"{worst['gapped']}",
            f"{worst['angle']:.1e}",
        ]
        for kind, worst in accuracy["worst"].items()
    ]
    header = ("", "layers", "energy, worst error", "with a gap of 1 %", "angle, worst")
    about = f"r = {accuracy['rank']}, {results['tokens']} tokens of each text."
    return markdown(header, rows) + notes(about, measured_on(results))


def divergences(first: Results, other: Results) -> str:
    """How well estimates of the KL order changes: those that ρ was found on, then others."""
    found = [results["divergence"] for results in (first, other)]
    halves = "KL of one half of the text with that of the other"
    rows = [
        [name, *(f"{each['correlation'][name]:.2f}" for each in found)]
        for name in found[0]["correlation"]
    ]
    rows.append([halves, *(f"{each['halves of the text']:.2f}" for each in found)])
    medians = " and ".join(f"{each['median of KL over estimate']:.2f}" for each in found)
    about = (
        f"{len(found[0]['changes'])} changes in each column; the median of the KL over the first "
        f"estimate is {medians}."
    )
    header = ("rank correlation with the KL", "changes of seed 0", "of seed 1")
    return markdown(header, rows) + notes(about, measured_on(first))


def penalties(results: Results) -> str:
    """What penalties changed, after the last step of each run."""
    rows = [
        [
            run["method"].removesuffix("-even"),
            f"{run['learning_rate']:g}",
            run["penalty"] or "none",
            f"{run['strength']:g}" if run["strength"] else EMPTY,
            *(
                f"{run[name]['change']:+.2f} ± {run[name]['change_se']:.2f}"
                for name in ("task", "knowledge", "text")
            ),
        ]
        for run in results["runs"]
        if run["strength"] in (None, 0, 1)
    ]
    header = ("start", "learning rate", "penalty", "strength", "task", "knowledge", "prose")
    return markdown(header, rows, text=3)


def adapter_costs(results: Results) -> str:
    """A training step of each form, against the LoRA that trains as many parameters."""
    (reference,) = (row for row in results["rows"] if row["form"] == "LoRA, rank 2r")
    rows = [
        [
            row["form"],
            f"{row['trained']:,}",
            f"{row['seconds']:.2f} s",
            ratio(row["seconds"] / reference["seconds"]),
            mebibytes(row["peak_bytes"]),
        ]
        for row in results["rows"]
    ]
    header = ("", "trained parameters", "a step", "× LoRA, rank 2r", "peak memory")
    about = (
        f"{model_name(results['model'])}, r = {results['rank']}, a step of "
        f"{results['sequences']} × {results['tokens']} tokens."
    )
    return markdown(header, rows) + notes(about, measured_on(results))
