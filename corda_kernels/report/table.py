"""A table, as a terminal and a page show it; and that of a report's layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from corda_kernels.report.content import Input, Report

# The columns in their order, and what they mean.
_MEANINGS = {
    "tokens": "number of tokens that the layer read",
    "experts": "number of fused experts; their tokens from the fewest to the most",
    "unrouted": "number of experts without tokens, which have the mean of their layer",
    "rank": "number of components trained",
    "in": "number of input channels",
    "out × in": "shape of the weight; of fused experts their number first",
    "σ max": "largest singular value of {product} trained",
    "σ min": "smallest singular value of {product} trained",
    "cond C": "largest over smallest eigenvalue of C",
    "cond C damped": "the same of C damped by {damping:g} times its mean diagonal",
    "cond W·C": "largest over smallest singular value of W·C",
    "eff. rank": "effective rank (Σλ)²/Σλ² of C",
    "head": "largest eigenvalue of C over the mean",
    "tail": "smallest eigenvalue of C over the mean",
    "outliers": "number of channels with |x| above {threshold}",
    "max |x|": "largest input, and its channel",
    "chosen": "candidate with the lowest score, summed over the layers that read one input; or all",
    "score min": "lowest score of the candidates, log π(C)·Σσ/σmax of the layer",
    "max": "highest score of the candidates",
    "spread": "standard deviation of the candidates' scores over their mean",
    "top": "overlap of the {rank} largest components between the two halves of the text",
    "bottom": "how quiet the smallest components of one half are in the other, from random "
    "directions (0) to the quietest there (1, on a logarithmic scale)",
    "verdict": "whether the halves agree",
}


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: one line on what it is of.
        columns: headings, one for each cell of a row.
        rows: cells; the first of each names the row.
        notes: lines on what the columns mean, and on what follows from the numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def layer_table(report: Report) -> Table:
    """The layers of a report, one a row, with the columns of which something is known."""
    inputs, conditions = report.input_of(), report.conditions()
    damped = "cond C damped" if report.damping else "cond C"
    rows: dict[str, dict[str, str]] = {}
    for name, layer in report.layers.items():
        row = rows[name] = _input_cells(inputs[name]) if name in inputs else {}
        if name in conditions:
            row[damped] = _ratio(conditions[name])
        if layer.tokens is not None:
            row.setdefault("tokens", f"{layer.tokens:,}")
        if layer.rank is not None:
            row["rank"] = str(layer.rank)
        if layer.shape is not None:
            row["out × in"] = " × ".join(map(str, layer.shape))
            row.pop("in", None)
        if layer.sigma is not None:
            row["σ max"], row["σ min"] = (f"{value:.2e}" for value in layer.sigma)
        if layer.spectrum is not None and layer.spectrum.condition is not None:
            row["cond W·C"] = _ratio(layer.spectrum.condition)
    for name, tokens in report.experts.items():
        row = rows[name] = {"tokens": f"{min(tokens):,} to {max(tokens):,}"}
        row |= {"experts": f"{len(tokens)}", "unrouted": f"{tokens.count(0)}"}
    for name, cells in (*_selection_cells(report), *_stability_cells(report)):
        if name in rows:
            rows[name] |= cells
    columns = [column for column in _MEANINGS if any(row.get(column) for row in rows.values())]
    facts = {
        "damping": report.damping,
        "product": report.product,
        "threshold": " or ".join(sorted({f"{entry.threshold:g}" for entry in inputs.values()})),
        "rank": report.stability.rank if report.stability else 0,
    }
    return Table(
        f"{report.name}: {report.title}",
        ("layer", *columns),
        tuple((name, *(row.get(column, "") for column in columns)) for name, row in rows.items()),
        tuple(f"{column}: {_MEANINGS[column].format(**facts)}" for column in columns),
    )


def _input_cells(entry: Input) -> dict[str, str]:
    row = {
        "tokens": f"{entry.tokens:,}",
        "in": f"{entry.channels}",
        "outliers": f"{entry.outliers}",
    }
    if entry.absmax:
        row["max |x|"] = f"{max(entry.absmax):.3g} ({entry.channel})"
    condition = entry.condition(0.0)
    if condition is not None:
        row["cond C"] = _ratio(condition)
        row["eff. rank"] = f"{entry.effective_rank:.1f}"
        row["head"] = f"{entry.largest:.1e}" if entry.largest else ""
        row["tail"] = f"{entry.smallest:.1e}" if entry.smallest else "0"
    return row


def _selection_cells(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    if (selection := report.selection) is None:
        return
    winners = selection.winners()
    for names, spread in zip(selection.groups, selection.spreads(), strict=True):
        for name in names:
            scores = selection.scores[name]
            chosen = str(winners[name] + 1) if selection.method == "argmin" else "all"
            row = {"chosen": chosen, "score min": f"{min(scores):.4g}", "max": f"{max(scores):.4g}"}
            yield name, row | {"spread": f"{spread:.1%}"}


def _stability_cells(report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    if (stability := report.stability) is None:
        return
    for name, layer in stability.layers.items():
        cells = {end: f"{x:.2f}" for end, x in vars(layer).items() if x is not None}
        yield name, cells | {"verdict": stability.verdict(layer)}


def _ratio(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "singular"
