"""The charts of a page, as inline SVG drawn by matplotlib; imported for pages only."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from corda_kernels.planning.stability import AGREEMENT
from corda_kernels.report.content import Input, Report, Spectrum
from corda_kernels.report.names import by_kind, printable, short

# In inches. A page shows a chart some 340 pixels wide, on a phone too, so that text keeps its size.
_WIDTH, _HEIGHT = 3.5, 2.5
_BLOCK = "block (number)"
_INPUT = "Input of "
# Okabe and Ito's colours, which the colour-blind can tell apart, those first that stand out on
# white; and markers, so that no line depends on its colour alone.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
# The verdicts' colours differ in lightness too.
_VERDICTS = {"stable": "#2c7fb8", "fair": "#fec44f", "unstable": "#a50f15"}
_STAGES = ("calibration", "stability", "selection", "allocation", "decomposition")
_SHARES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)

# What a chart is of, and its SVG element, which says what it shows to those who do not see it.
Panel = tuple[str, Markup]
_Entries = list[tuple[int, str]]  # block and name of the layers of a kind


def draw_sections(report: Report) -> dict[str, list[Panel]]:
    """The charts of every section, none where nothing is known."""
    inputs = {entry.layers[0]: entry for entry in report.inputs if entry.layers}
    products = {name: layer.spectrum for name, layer in report.layers.items() if layer.spectrum}
    values = {name: entry.spectrum for name, entry in inputs.items() if entry.spectrum}
    mebibytes = {what: size / 2**20 for what, size in report.memory.items() if size}
    seconds = {stage: report.seconds[stage] for stage in _STAGES if stage in report.seconds}
    with rc_context(fname=Path(__file__).with_name("figures.mplstyle")):
        return {
            "ranks": _ranks(report),
            "products": _spectra(products, "component", "σ / largest σ known", relative=True),
            "eigenvalues": _spectra(values, "eigenvalue", "λ / mean λ", prefix=_INPUT),
            "conditions": _conditions(report),
            "outliers": _outliers(inputs),
            "selection": _selection(report),
            "stability": _stability(report),
            "time": _bars("Time", "time (seconds)", "stage (name)", seconds)
            + _bars("Memory", "memory (MiB)", "use (name)", mebibytes),
        }


def _ranks(report: Report) -> list[Panel]:
    """Ranks of a budget by block, against the uniform rank."""
    if not report.allocation:
        return []
    ranks = {name: layer.rank or 0 for name, layer in report.layers.items()}
    uniform = report.uniform_rank()

    def plot(entries: _Entries, axes: Axes) -> str:
        shown = [ranks[name] for _, name in entries]
        axes.bar([block for block, _ in entries], shown, width=0.8, color=_COLOURS[0])
        if uniform is not None:
            axes.axhline(uniform, color=_COLOURS[1], linestyle="--")
            # Above the bars, which may be higher than the line.
            axes.set_title(f"dashed: uniform rank {uniform:.3g}")
        axes.set_ylim(0, 1.08 * max(*ranks.values(), uniform or 0))
        return f"from {min(shown)} to {max(shown)}"

    return _each_kind(ranks, plot, _BLOCK, "rank (components)")


def _spectra(
    spectra: Mapping[str, Spectrum], what: str, ratio: str, prefix: str = "", relative: bool = False
) -> list[Panel]:
    """Spectra, one line a block, all on the same axes so that they can be compared.

    Each value stands at the middle of its share of all; those of zero are left out.
    """
    lines = {}
    for name, spectrum in spectra.items():
        unit = max(spectrum.value) if relative else 1.0
        pairs = zip(spectrum.index, spectrum.value, strict=True)
        line = [((index + 0.5) / spectrum.total, value / unit) for index, value in pairs if value]
        if line:
            lines[name] = np.array(line)
    if not lines:
        return []
    points = np.concatenate(list(lines.values()))

    def plot(entries: _Entries, axes: Axes) -> str:
        first, last = entries[0][0], entries[-1][0]
        labels = {block: f"block {block}" for block in (first, last)}
        for block, name in entries:
            # Its upper end is too pale for white paper.
            colour = colormaps["viridis"](0.82 * (block - first) / max(last - first, 1))
            axes.plot(*lines[name].T, color=colour, label=labels.pop(block, None), lw=0.8)
        axes.set_xscale("logit")
        _logarithmic(axes)
        axes.update_datalim([points.min(0), points.max(0)])
        axes.margins(0.06)
        axes.set_xticks(_ticks(axes))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(loc="best")
        falls = [lines[name][0, 1] / lines[name][-1, 1] for _, name in entries]
        return f"falling by a factor of {statistics.median(falls):.2g} in the median layer"

    x = f"{what}, from the largest (share of all)"
    return _each_kind(lines, plot, x, f"{ratio} (ratio)", prefix)


def _ticks(axes: Axes) -> list[float]:
    """Shares to label: round ones within the limits, and finer ones where few of those are."""
    low, high = axes.get_xlim()
    inside = [share for share in _SHARES if low <= share <= high]
    if len(inside) >= 3:
        return inside
    logit = axes.xaxis.get_transform()
    first, last = logit.transform([low, high])
    shares = logit.inverted().transform(np.linspace(first, last, 9)[1::2])
    return [float(f"{s:.1g}") if s < 0.5 else 1 - float(f"{1 - s:.1g}") for s in shares]


def _conditions(report: Report) -> list[Panel]:
    """λmax/λmin of C, and σmax/σmin of W·C, by block."""
    # Layers that read one input share its condition: the first of them stands for all.
    others = {name for entry in report.inputs for name in entry.layers[1:]}
    of_inputs = {
        name: value
        for name, value in report.conditions().items()
        if math.isfinite(value) and name not in others
    }
    of_layers = {
        name: condition
        for name, layer in report.layers.items()
        if layer.spectrum and (condition := layer.spectrum.condition)
    }
    return _lines("C, the inputs", "λmax / λmin (ratio)", of_inputs) + _lines(
        "W·C, the layers", "σmax / σmin (ratio)", of_layers
    )


def _outliers(inputs: Mapping[str, Input]) -> list[Panel]:
    """Channels whose inputs are far larger than those of the median channel."""
    known = {name: entry for name, entry in inputs.items() if entry.absmax and entry.median > 0}
    ratios = {name: [x / entry.median for x in entry.absmax] for name, entry in known.items()}
    peak = max([10.0, *(max(row) for row in ratios.values())])

    def plot(entries: _Entries, axes: Axes) -> str:
        channels = max(known[name].channels for _, name in entries)
        runs = max(len(ratios[name]) for _, name in entries)
        image = axes.imshow(
            [ratios[name] + [math.nan] * (runs - len(ratios[name])) for _, name in entries],
            norm=LogNorm(1, peak, clip=True),
            extent=(0, channels, len(entries) - 0.5, -0.5),
        )
        axes.grid(False)
        axes.set_yticks(*_some([block for block, _ in entries]))
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30, format="%g×")
        bar.minorticks_off()
        bar.set_label("|x| max / median channel's (ratio)", fontsize=7)
        block, name = max(entries, key=lambda entry: max(ratios[entry[1]]))
        times, channel = max(ratios[name]), known[name].channel
        return f"at most {times:.3g} times, channel {channel} of block {block}"

    return _each_kind(known, plot, "channel (number)", _BLOCK, _INPUT)


def _selection(report: Report) -> list[Panel]:
    """How often each candidate was chosen; and the scores by input, the chosen one filled."""
    selection = report.selection
    if selection is None or selection.rounds < 2:
        return []
    winners = selection.winners()
    totals = zip(selection.groups, selection.totals(), strict=True)
    scores = {names[0]: total for names, total in totals}
    chosen = [winners[name] for name in scores]
    counts = {str(number + 1): chosen.count(number) for number in range(selection.rounds)}

    def plot(entries: _Entries, axes: Axes) -> str:
        blocks = [block for block, _ in entries]
        rows = np.array([scores[name] for _, name in entries])
        means = rows.mean(1, keepdims=True)
        rows = 100 * (rows / np.where(means, means, 1.0) - 1)
        best = [row[winners[name]] for row, (_, name) in zip(rows, entries, strict=True)]
        axes.vlines(blocks, rows.min(1), rows.max(1), color="#bbbbbb", lw=0.8)
        points = axes.plot(blocks, rows, "o", mfc="white", mec="#555555", mew=0.6)
        points[0].set_label("others")
        axes.plot(blocks, best, "D", color=_COLOURS[1], ms=3.5, label="chosen")
        axes.legend(loc="best", ncols=2, handletextpad=0.1)
        apart = statistics.median(np.ptp(rows, axis=1))
        return f"candidates lie apart by {apart:.2g} % in the median block"

    return [
        *_bars("Lowest score", "inputs (count)", "candidate (number)", counts),
        *_each_kind(scores, plot, _BLOCK, "score over its mean − 1 (%)", _INPUT),
    ]


def _stability(report: Report) -> list[Panel]:
    """Verdict of every layer, and the numbers behind it."""
    if report.stability is None or not report.stability.layers:
        return []
    layers = report.stability.layers
    order = list(_VERDICTS)
    grades = {n: order.index(report.stability.verdict(layer)) for n, layer in layers.items()}
    kinds = by_kind(grades)

    def plot(axes: Axes) -> str:
        blocks = sorted({block for entries in kinds.values() for block, _ in entries})
        cells = np.full((len(kinds), len(blocks)), np.nan)
        for row, entries in enumerate(kinds.values()):
            for block, name in entries:
                # Experts of one block share a cell: it shows the worst.
                place = row, blocks.index(block)
                cells[place] = np.fmax(cells[place], grades[name])
        colours = ListedColormap(list(_VERDICTS.values()))
        axes.pcolormesh(cells, cmap=colours, vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=0.4)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], [short(k, 20) for k in kinds])
        axes.set_xticks(*_some(blocks, 0.5))
        handles = [Patch(color=colour, label=name) for name, colour in _VERDICTS.items()]
        axes.figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=0.7)
        found = list(grades.values())
        return ", ".join(f"{found.count(grade)} {name}" for grade, name in enumerate(order))

    height = 1.2 + 0.2 * len(kinds)
    panels = [_draw("Verdict by layer", _BLOCK, "layer (kind)", plot, height)]
    for end, name in AGREEMENT.items():
        values = {n: v for n, layer in layers.items() if (v := getattr(layer, name)) is not None}
        title = f"{end.capitalize()} components"
        panels += _lines(title, "agreement of the halves (0 … 1)", values, log=False)
    return panels


def _lines(title: str, y: str, values: Mapping[str, float], *, log: bool = True) -> list[Panel]:
    """A line a kind over the blocks; no chart without values."""

    def plot(axes: Axes) -> str:
        axes.set_prop_cycle(color=_COLOURS, marker=list(_MARKERS))
        for kind, entries in by_kind(values, len(_MARKERS)).items():
            blocks, names = zip(*entries, strict=True)
            axes.plot(blocks, [values[name] for name in names], label=short(kind), lw=0.7)
        if log:
            _logarithmic(axes)
        axes.figure.legend(loc="outside lower left", ncols=2)
        return f"from {min(values.values()):.2g} to {max(values.values()):.2g}"

    return [_draw(title, _BLOCK, y, plot, 3.1)] if values else []


def _bars(title: str, x: str, y: str, values: Mapping[str, float]) -> list[Panel]:
    """A bar for each value; no chart without values."""

    def plot(axes: Axes) -> str:
        shown = [f"{v:,.3g}" if v < 1000 else f"{v:,.0f}" for v in values.values()]
        bars = axes.barh(range(len(values)), list(values.values()), color=_COLOURS[0], height=0.6)
        axes.bar_label(bars, shown, fontsize=7, padding=2)
        axes.set_yticks(range(len(values)), [short(name, 24) for name in values])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        return ", ".join(f"{name} {text}" for name, text in zip(values, shown, strict=True))

    return [_draw(title, x, y, plot, 0.9 + 0.3 * len(values))] if values else []


def _each_kind(
    names: Iterable[str], plot: Callable[[_Entries, Axes], str], x: str, y: str, prefix: str = ""
) -> list[Panel]:
    """A chart for each kind of layers."""
    return [
        _draw(prefix + short(kind), x, y, partial(plot, entries))
        for kind, entries in by_kind(names).items()
    ]


def _some(blocks: list[int], offset: float = 0.0) -> tuple[list[float], list[str]]:
    """Places and labels of some of the blocks that stand in a row."""
    shown = range(0, len(blocks), max(1, len(blocks) // 6))
    return [place + offset for place in shown], [str(blocks[place]) for place in shown]


def _draw(
    title: str, x: str, y: str, plot: Callable[[Axes], str], height: float = _HEIGHT
) -> Panel:
    """Draws one chart.

    Args:
        title: what it is of.
        x: what the horizontal axis shows, with its unit in brackets.
        y: the vertical one.
        plot: draws into the axes; returns what to add to the description.
        height: in inches.
    """
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    if x == _BLOCK:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    alt = printable(f"{title}: {y} against {x}; {plot(axes)}")
    axes.set_xlabel(x, gid="x-unit")
    axes.set_ylabel(y, gid="y-unit")
    written = io.StringIO()
    # The salt keeps names inside the element from meeting those of the page's other charts.
    with rc_context({"svg.hashsalt": alt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has more fonts
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.patch.set_visible(False)
        for each in figure.axes:
            each.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(written, metadata=metadata)  # savefig would draw twice
    head = Markup('<svg role="img" aria-label="{}"').format(alt)
    return title, Markup(_inlined(written.getvalue()).replace("<svg", head, 1))


_NEEDLESS = re.compile(
    r"\A.*?(?=<svg)|<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>"
    r'| xmlns(?::\w+)?="[^"]*"|(?<=<g) id="(?![xy]-unit")[^"]*"'
    r"|font-family: 'DejaVu Sans'; ",  # the page has its own
    re.DOTALL,
)
_SIZE = re.compile(r' width="[^"]*" height="[^"]*"')
_COORDINATES = re.compile(r'\b(?:d|x|y|transform)="[^"]*"')
_DIGITS = re.compile(r"(\.\d\d)\d+")


def _inlined(document: str) -> str:
    """The element of an SVG document, for use inside HTML, in fewer bytes."""
    svg = _SIZE.sub("", _NEEDLESS.sub("", document), count=1)
    svg = re.sub(r'id="([xy]-unit)"', r'class="\1"', svg)
    svg = _COORDINATES.sub(lambda match: _DIGITS.sub(r"\1", match[0]).replace(" \n", " "), svg)
    return re.sub(r">\s+<", "><", svg).strip()


def power_of_ten(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis: 1e-3 gives 10⁻³, and what is no power of ten nothing."""
    exponent = round(math.log10(value)) if value > 0 else 0
    if not math.isclose(value, 10.0**exponent, rel_tol=1e-6):
        return ""
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{value:g}" if -2 <= exponent <= 3 else "10" + str(exponent).translate(superscripts)


def _logarithmic(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(power_of_ten)
    axes.yaxis.set_minor_formatter(NullFormatter())
