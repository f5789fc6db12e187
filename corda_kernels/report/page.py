"""A report as one HTML page that needs nothing else: no network, no fonts, no scripts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from corda_kernels.outputs import atomic_path
from corda_kernels.report import figures
from corda_kernels.report.content import Report
from corda_kernels.report.drawing import Panel, check_matplotlib
from corda_kernels.report.layout import CSS
from corda_kernels.report.table import layer_table, legend
from corda_kernels.report.text import escaped
from corda_kernels.versions import library_versions

# Characters from which on a line of the summary takes the whole width.
_LONG = 60


@dataclass(frozen=True)
class _Section:
    """A heading, what the figures below it show, and what to say where there are none."""

    title: str
    text: str
    panels: Sequence[Panel]
    absent: str


def write_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes a report's page.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    text = html_page(report)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def html_page(report: Report) -> str:
    """A report's page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_matplotlib()
    parts = [_summary(report)]
    number = 0
    for section in _sections(report):
        drawn = []
        for panel in section.panels:
            number += 1
            drawn.append(_figure(panel, number))
        text = section.text if drawn else section.absent
        body = f"<p>{escaped(text)}</p>"
        if drawn:
            body += f'<div class="panels">{"".join(drawn)}</div>'
        parts.append(f"<section><h2>{escaped(section.title)}</h2>{body}</section>")
    parts.append(
        '<section class="table"><h2>Layers</h2>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of all layers">'
        f"{layer_table(report)}</div>{legend(report)}</section>"
    )
    if report.left_out:
        items = "".join(
            f"<li><code>{escaped(name)}</code>: {escaped(reason)}</li>"
            for name, reason in report.left_out.items()
        )
        parts.append(f"<section><h2>Left out</h2><ul>{items}</ul></section>")
    title = escaped(report.name)
    version = escaped(library_versions()["corda_kernels"])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} – corda-kernels</title><style>{CSS}</style></head>\n"
        f"<body><header><h1>{title}</h1></header>\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<footer>corda_kernels {version}</footer></body></html>\n"
    )


def _summary(report: Report) -> str:
    lines = []
    for label, text in report.summary:
        wide = ' class="wide"' if len(text) > _LONG else ""
        lines.append(f"<div{wide}><dt>{escaped(label)}</dt><dd>{escaped(text)}</dd></div>")
    return f'<section><h2>Summary</h2><dl class="summary">{"".join(lines)}</dl></section>'


def _figure(panel: Panel, number: int) -> str:
    # Names inside an element must not meet those of the other charts.
    svg = re.sub(r'( id="|"#|url\(#)', rf"\g<1>f{number}-", panel.svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escaped(panel.alt)}"', 1)
    return f"<figure><figcaption>{escaped(panel.title)}</figcaption>{svg}</figure>"


def _sections(report: Report) -> list[_Section]:
    damping = f"damped by {report.damping:g} times its mean diagonal" if report.damping else "as is"
    again = "make the adapter again to have it recorded"
    selection = report.selection
    found = [
        _Section(
            "Spectra of W·C",
            f"Singular values of each layer's weight times its inputs' covariance, {damping}, one "
            "line a block, dark for the first and light for the last. The axis gives either end "
            f"as much room as the middle.{_trained(report)}",
            figures.spectrum_panels(report),
            "No spectrum of W·C is recorded here. It shows with the model: "
            "corda-kernels inspect COVARIANCES --model MODEL --html PAGE"
            + (f"; or {again}." if report.mode else "."),
        ),
        _Section(
            "Spectra of C",
            "Eigenvalues of each input's covariance, without damping. Where a line ends early the "
            "rest is zero: C is singular.",
            figures.eigenvalue_panels(report),
            "The eigenvalues of the covariances are not recorded in an adapter. They show with "
            "the covariances: corda-kernels inspect ADAPTER --cov COVARIANCES --html PAGE.",
        ),
        _Section(
            "Conditions",
            f"Largest over smallest eigenvalue of C, {damping}, and largest over smallest singular "
            "value of W·C. Float32 arithmetic knows about seven digits: beyond a condition of 10⁷ "
            f"its small end is noise.{_unbounded(report)}",
            figures.condition_panels(report),
            "No condition is known: the run decomposed one end of each spectrum only. A budget, or "
            "inspect with --cov and --model, looks at both.",
        ),
        _Section(
            "Outlier channels",
            "How much larger the largest |x| of a channel is than that of the median channel of "
            "the same input. A column that stays dark is one channel that is loud in every block.",
            figures.outlier_panels(report),
            "No channel statistics are recorded here: "
            + ("show them with --cov COVARIANCES." if report.mode else "calibrate again."),
        ),
    ]
    if report.mode:
        ranks = _Section(
            "Ranks",
            "Ranks that the budget was shared out in; dashed, the rank that the same number of "
            "parameters would have paid for in every layer.",
            figures.rank_panels(report),
            "Every layer has the same rank: there was no budget to share out.",
        )
        found.insert(0, ranks)
    found += [
        _Section(
            "Selection",
            ""
            if selection is None
            else f"Score of each candidate, log π(C)·Σσ/σmax summed over the layers that read one "
            f"input, against the mean of all {selection.rounds}; the lower the better. "
            + (
                "Diamonds mark the one with the lowest score, which the layer keeps."
                if selection.method == "argmin"
                else "Diamonds mark the one with the lowest score; all were pooled."
            ),
            figures.selection_panels(report),
            "There was one candidate: nothing to select.",
        ),
        _Section(
            "Stability",
            "Do two halves of the text lead to the same subspaces? For the largest components "
            "their overlap counts; for the smallest, how quiet those of one half are in the other, "
            "from random directions (0) to the quietest there (1).",
            figures.stability_panels(report),
            "Stability was not measured: it takes two halves of one text. `calibrate` measures it, "
            "and `init --stability`, but not of several candidates.",
        ),
        _Section(
            "Time and memory",
            f"{'Stages of the run that made the adapter. ' if report.seconds else ''}"
            "Covariances are those of all distinct inputs in float32; an adapter is its factors, "
            "and beside a residual its initial ones too.",
            figures.time_panels(report),
            "Neither is recorded here.",
        ),
    ]
    return found


def _trained(report: Report) -> str:
    if report.mode is None:
        return ""
    known = [layer.spectrum for layer in report.layers.values() if layer.spectrum]
    if known and not all(spectrum.whole for spectrum in known):
        return (
            " Only the end that the adapter trains is known: the other was not computed. The "
            "covariances and the model show it: inspect ADAPTER --cov COVARIANCES --model MODEL."
        )
    return ""


def _unbounded(report: Report) -> str:
    count = sum(value == float("inf") for value in report.conditions().values())
    return f" C is singular for {count} layers, which are not drawn." if count else ""
