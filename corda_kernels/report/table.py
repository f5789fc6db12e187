"""The table of all layers, the numbers behind the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from corda_kernels.report.content import Input, Report
from corda_kernels.report.text import escaped, short

_LONGEST_NAME = 40


@dataclass(frozen=True)
class _Column:
    """Heading, what it means, and the cells by layer; a column without cells is left out."""

    heading: str
    meaning: str
    cells: Mapping[str, str]


def layer_table(report: Report) -> str:
    """An HTML table, one row a layer, of the columns of which something is known."""
    columns = _known_columns(report)
    heads = "".join(f'<th scope="col">{escaped(column.heading)}</th>' for column in columns)
    rows = []
    for name in report.layers:
        cells = "".join(f"<td>{escaped(column.cells.get(name, ''))}</td>" for column in columns)
        full, label = escaped(name), escaped(short(name, _LONGEST_NAME))
        title = "" if label == full else f' title="{full}"'
        rows.append(f'<tr><th scope="row"{title}>{label}</th>{cells}</tr>')
    return (
        f'<table><caption>{len(rows)} layers</caption><thead><tr><th scope="col">layer</th>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def legend(report: Report) -> str:
    """What the table's columns mean, as an HTML list."""
    meanings = "".join(
        f"<li><b>{escaped(column.heading)}</b>: {escaped(column.meaning)}</li>"
        for column in _known_columns(report)
    )
    return f'<ul class="legend">{meanings}</ul>'


def _known_columns(report: Report) -> list[_Column]:
    return [column for column in _columns(report) if any(column.cells.values())]


def _columns(report: Report) -> list[_Column]:
    layers = report.layers
    inputs = report.input_of()
    shapes = {n: f"{e.shape[0]} × {e.shape[1]}" for n, e in layers.items() if e.shape}
    sigmas = {name: entry.sigma for name, entry in layers.items() if entry.sigma}
    whole = {
        name: entry.spectrum.condition
        for name, entry in layers.items()
        if entry.spectrum and entry.spectrum.condition
    }
    return [
        _Column("out × in", "shape of the weight", shapes),
        _Column(
            "rank",
            "components trained",
            {n: str(e.rank) for n, e in layers.items() if e.rank is not None},
        ),
        _Column(
            "σ max", "largest singular value trained", {n: f"{s[0]:.2e}" for n, s in sigmas.items()}
        ),
        _Column(
            "σ min",
            "smallest singular value trained",
            {n: f"{s[1]:.2e}" for n, s in sigmas.items()},
        ),
        _Column(
            "cond C",
            "largest over smallest eigenvalue of the damped covariance",
            {name: f"{value:.1e}" for name, value in report.conditions().items()},
        ),
        _Column(
            "cond W·C",
            "largest over smallest singular value",
            {name: f"{value:.1e}" for name, value in whole.items()},
        ),
        *_of_inputs({name: inputs[name] for name in layers if name in inputs}),
        *_judgements(report),
    ]


def _of_inputs(inputs: Mapping[str, Input]) -> list[_Column]:
    thresholds = {f"{entry.threshold:g}" for entry in inputs.values()}
    return [
        _Column("tokens", "seen by the layer", {n: f"{e.tokens:,}" for n, e in inputs.items()}),
        _Column(
            "outliers",
            f"channels with |x| above {' or '.join(sorted(thresholds))}",
            {name: str(entry.outliers) for name, entry in inputs.items()},
        ),
        _Column(
            "max |x|",
            "largest input, and its channel",
            {n: f"{max(e.absmax):.3g} ({e.channel})" for n, e in inputs.items() if e.absmax},
        ),
    ]


def _judgements(report: Report) -> list[_Column]:
    columns = []
    if report.stability is not None:
        stability = report.stability
        for heading, field, meaning in (
            ("top", "top", "overlap of the largest components between the halves of the text"),
            ("bottom", "bottom", "how quiet one half's smallest components are in the other"),
        ):
            values = {n: getattr(entry, field) for n, entry in stability.layers.items()}
            cells = {n: f"{value:.2f}" for n, value in values.items() if value is not None}
            columns.append(_Column(heading, meaning, cells))
        verdicts = {n: stability.verdict(entry) for n, entry in stability.layers.items()}
        columns.append(_Column("verdict", "whether the halves agree", verdicts))
    if report.selection is not None:
        selection = report.selection
        pooled = selection.method != "argmin"
        chosen = {n: "all" if pooled else str(w + 1) for n, w in selection.winners().items()}
        spreads = {
            name: f"{spread:.1%}"
            for names, spread in zip(selection.groups, selection.spreads(), strict=True)
            for name in names
        }
        columns += [
            _Column("chosen", "candidate that the layer keeps", chosen),
            _Column("spread", "standard deviation of the candidates' scores over mean", spreads),
        ]
    return columns
