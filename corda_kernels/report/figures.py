"""The charts of a page, section by section; imported for pages only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from corda_kernels.report.content import Input, Report, Spectrum
from corda_kernels.report.drawing import COLOURS, MARKERS, Panel, draw, logarithmic
from corda_kernels.report.names import by_kind, short

_BLOCK = "block (number)"
_INPUT = "Input of "
# Kinds of layers with a chart, or a line in one; a model has seven or so.
_MOST_KINDS = 12
_MOST_LINES = 7
# The verdicts' colours differ in lightness too.
_VERDICTS = {"stable": "#2c7fb8", "fair": "#fec44f", "unstable": "#a50f15"}
_STAGES = ("calibration", "stability", "selection", "allocation", "decomposition")
_SHARES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)

_Entries = list[tuple[int, str]]  # block and name of the layers of a kind


def draw_sections(report: Report) -> dict[str, list[Panel]]:
    """The charts of every section, none where nothing is known."""
    products = {name: layer.spectrum for name, layer in report.layers.items() if layer.spectrum}
    values = {e.layers[0]: e.spectrum for e in report.inputs if e.layers and e.spectrum}
    top = all(spectrum.index[0] == 0 for spectrum in products.values())
    mebibytes = {what: size / 2**20 for what, size in report.memory.items() if size}
    seconds = {stage: report.seconds[stage] for stage in _STAGES if stage in report.seconds}
    with rc_context(fname=Path(__file__).with_name("figures.mplstyle")):
        return {
            "ranks": _ranks(report),
            "products": _spectra(
                {name: _line(spectrum, spectrum.value[0]) for name, spectrum in products.items()},
                "component, from the largest (share of all)",
                f"σ / {'σmax' if top else 'largest σ trained'} (ratio)",
            ),
            "eigenvalues": _spectra(
                {name: _line(spectrum, 1.0) for name, spectrum in values.items()},
                "eigenvalue, from the largest (share of all)",
                "λ / mean λ (ratio)",
                _INPUT,
            ),
            "conditions": _conditions(report),
            "outliers": _outliers(report.inputs),
            "selection": _selection(report),
            "stability": _stability(report),
            "time": _bars("Time", "time (seconds)", "stage (name)", seconds)
            + _bars("Memory", "memory (MiB)", "use (name)", mebibytes),
        }


def kinds_shown(names: Iterable[str], most: int = _MOST_KINDS) -> dict[str, _Entries]:
    """The kinds that have the most layers, in the model's order: block and name of each."""
    kinds = by_kind(names)
    largest = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:most]
    return {kind: entries for kind, entries in kinds.items() if kind in largest}


def _each_kind(
    names: Iterable[str],
    plot: Callable[[_Entries, Axes], str],
    x: str,
    y: str,
    prefix: str = "",
) -> list[Panel]:
    """A chart for each kind of layers."""
    return [
        draw(prefix + short(kind), x, y, partial(plot, sorted(entries)))
        for kind, entries in kinds_shown(names).items()
    ]


def _ranks(report: Report) -> list[Panel]:
    """Ranks of a budget by block, against the uniform rank."""
    if not report.allocation:
        return []
    ranks = {name: layer.rank or 0 for name, layer in report.layers.items()}
    uniform = report.uniform_rank()

    def plot(entries: _Entries, axes: Axes) -> str:
        shown = [ranks[name] for _, name in entries]
        axes.bar([block for block, _ in entries], shown, width=0.8, color=COLOURS[0])
        if uniform is not None:
            axes.axhline(uniform, color=COLOURS[1], linestyle="--", linewidth=1)
            # Above the bars, which may be higher than the line.
            axes.set_title(f"dashed: uniform rank {uniform:.3g}", loc="right", fontsize=7)
        axes.set_ylim(0, 1.08 * max(*ranks.values(), uniform or 0))
        _whole_numbers(axes)
        return f"from {min(shown)} to {max(shown)}"

    return _each_kind(ranks, plot, _BLOCK, "rank (components)")


def _line(spectrum: Spectrum, unit: float) -> list[tuple[float, float]]:
    """Share of all components, in the middle of each, and value; those of zero are left out."""
    return [
        ((index + 0.5) / spectrum.total, value / unit)
        for index, value in zip(spectrum.index, spectrum.value, strict=True)
        if value > 0 and unit > 0
    ]


def _spectra(
    lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, prefix: str = ""
) -> list[Panel]:
    """Spectra, one line a block, all on the same axes so that they can be compared."""
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return []
    shares, values = zip(*(point for line in lines.values() for point in line), strict=True)
    corners = [(min(shares), min(values)), (max(shares), max(values))]

    def plot(entries: _Entries, axes: Axes) -> str:
        first, last = entries[0][0], entries[-1][0]
        labels = {block: f"block {block}" for block in (first, last)}
        for block, name in entries:
            # Its upper end is too pale for white paper.
            colour = colormaps["viridis"](0.82 * (block - first) / max(last - first, 1))
            axes.plot(
                *zip(*lines[name], strict=True), color=colour, label=labels.pop(block, None), lw=0.8
            )
        axes.set_xscale("logit")
        logarithmic(axes)
        axes.update_datalim(corners)
        axes.margins(0.06)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(axes)))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(loc="best", handlelength=1.2)
        falls = [lines[name][0][1] / lines[name][-1][1] for _, name in entries]
        return f"falling by a factor of {statistics.median(falls):.2g} in the median layer"

    return _each_kind(lines, plot, x, y, prefix)


def _ticks(axes: Axes) -> list[float]:
    """Shares to label: round ones within the limits, and finer ones where few of those are."""
    low, high = axes.get_xlim()
    inside = [share for share in _SHARES if low <= share <= high]
    if len(inside) >= 3:
        return inside
    logit = axes.xaxis.get_transform()
    first, last = logit.transform([low, high])
    places = [first + (last - first) * step / 8 for step in (1, 3, 5, 7)]
    shares = logit.inverted().transform(places)
    return [float(f"{s:.1g}") if s < 0.5 else 1 - float(f"{1 - s:.1g}") for s in shares]


def _conditions(report: Report) -> list[Panel]:
    """λmax/λmin of C, and σmax/σmin of W·C, by block."""
    inputs = report.input_of()
    # Layers that read one input share its condition: the first of them stands for all.
    of_inputs = {
        name: value
        for name, value in report.conditions().items()
        if math.isfinite(value) and (name not in inputs or inputs[name].layers[0] == name)
    }
    of_layers = {
        name: condition
        for name, layer in report.layers.items()
        if layer.spectrum and (condition := layer.spectrum.condition)
    }
    return _lines("C, the inputs", "λmax / λmin (ratio)", of_inputs) + _lines(
        "W·C, the layers", "σmax / σmin (ratio)", of_layers
    )


def _lines(title: str, y: str, values: Mapping[str, float], *, log: bool = True) -> list[Panel]:
    """A line a kind over the blocks."""

    def plot(axes: Axes) -> str:
        for number, (kind, entries) in enumerate(kinds_shown(values, _MOST_LINES).items()):
            points = [(block, values[name]) for block, name in sorted(entries)]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number],
                marker=MARKERS[number],
                linewidth=0.7,
                label=short(kind),
            )
        if log:
            logarithmic(axes)
        _whole_numbers(axes)
        axes.figure.legend(loc="outside lower left", ncols=2, handlelength=1.4, columnspacing=1.0)
        return f"from {min(values.values()):.2g} to {max(values.values()):.2g}"

    return [draw(title, _BLOCK, y, plot, height=3.1)] if values else []


def _outliers(inputs: Iterable[Input]) -> list[Panel]:
    """Channels whose inputs are far larger than those of the median channel."""
    known = {e.layers[0]: e for e in inputs if e.layers and e.absmax and e.median > 0}
    ratios = {n: [value / e.median for value in e.absmax] for n, e in known.items()}
    peak = max([10.0, *(max(row) for row in ratios.values())])

    def plot(entries: _Entries, axes: Axes) -> str:
        channels = max(known[name].channels for _, name in entries)
        runs = max(len(ratios[name]) for _, name in entries)
        image = axes.imshow(
            [ratios[name] + [math.nan] * (runs - len(ratios[name])) for _, name in entries],
            aspect="auto",
            interpolation="nearest",
            cmap="magma_r",
            norm=LogNorm(1, peak, clip=True),
            extent=(0, channels, len(entries) - 0.5, -0.5),
        )
        axes.grid(False)
        axes.set_yticks(*_some([block for block, _ in entries]))
        steps = [10.0**step for step in range(1 + math.floor(math.log10(peak)))]
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30, ticks=steps, format="%g×")
        bar.minorticks_off()
        bar.set_label("|x| max / median channel's (ratio)", fontsize=7)
        bar.outline.set_linewidth(0.4)
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
    scores = {
        names[0]: total
        for names, total in zip(selection.groups, selection.totals(), strict=True)
        if names
    }
    chosen = [winners[name] for name in scores]
    counts = {str(number + 1): chosen.count(number) for number in range(selection.rounds)}

    def plot(entries: _Entries, axes: Axes) -> str:
        blocks = [block for block, _ in entries]
        rows = []
        for _, name in entries:
            mean = statistics.fmean(scores[name]) or 1.0
            rows.append([100 * (score / mean - 1) for score in scores[name]])
        best = [row[winners[name]] for row, (_, name) in zip(rows, entries, strict=True)]
        spreads = [max(row) - min(row) for row in rows]
        axes.vlines(blocks, list(map(min, rows)), list(map(max, rows)), color="#bbbbbb", lw=0.8)
        points = axes.plot(blocks, rows, "o", mfc="white", mec="#555555", ms=3, mew=0.6)
        points[0].set_label("others")
        axes.plot(blocks, best, "D", color=COLOURS[1], ms=3.5, label="chosen")
        axes.legend(loc="best", ncols=2, handletextpad=0.1, columnspacing=0.8)
        _whole_numbers(axes)
        return f"candidates lie apart by {statistics.median(spreads):.2g} % in the median block"

    return [
        *_bars("Lowest score", "inputs (count)", "candidate (number)", counts),
        *_each_kind(scores, plot, _BLOCK, "score over its mean − 1 (%)", _INPUT),
    ]


def _stability(report: Report) -> list[Panel]:
    """Verdict of every layer, and the numbers behind it."""
    stability = report.stability
    if stability is None or not stability.layers:
        return []
    layers = stability.layers
    panels = [_verdicts({name: stability.verdict(layer) for name, layer in layers.items()})]
    for title, end in (("Largest components", "top"), ("Smallest components", "bottom")):
        values = {n: v for n, layer in layers.items() if (v := getattr(layer, end)) is not None}
        panels += _lines(title, "agreement of the halves (0 … 1)", values, log=False)
    return panels


def _verdicts(verdicts: Mapping[str, str]) -> Panel:
    kinds = kinds_shown(verdicts)
    order = list(_VERDICTS)

    def plot(axes: Axes) -> str:
        blocks = sorted({block for entries in kinds.values() for block, _ in entries})
        rows = [[math.nan] * len(blocks) for _ in kinds]
        for row, entries in zip(rows, kinds.values(), strict=True):
            for block, name in entries:
                column, grade = blocks.index(block), order.index(verdicts[name])
                # Experts of one block share a cell: it shows the worst.
                row[column] = grade if math.isnan(row[column]) else max(row[column], grade)
        colours = ListedColormap(list(_VERDICTS.values()))
        axes.pcolormesh(rows, cmap=colours, vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=0.4)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], [short(k, 20) for k in kinds])
        axes.set_xticks(*_some(blocks, 0.5))
        handles = [Patch(color=colour, label=name) for name, colour in _VERDICTS.items()]
        axes.figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=0.7)
        found = list(verdicts.values())
        return ", ".join(f"{found.count(verdict)} {verdict}" for verdict in order)

    height = 1.2 + 0.2 * len(kinds)
    return draw("Verdict by layer", _BLOCK, "layer (kind)", plot, height=height)


def _bars(title: str, x: str, y: str, values: Mapping[str, float]) -> list[Panel]:
    """A bar for each value; no chart without values."""

    def plot(axes: Axes) -> str:
        shown = [f"{v:,.3g}" if v < 1000 else f"{v:,.0f}" for v in values.values()]
        bars = axes.barh(range(len(values)), list(values.values()), color=COLOURS[0], height=0.6)
        axes.bar_label(bars, shown, fontsize=7, padding=2)
        axes.set_yticks(range(len(values)), [short(name, 24) for name in values])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        return ", ".join(f"{name} {text}" for name, text in zip(values, shown, strict=True))

    return [draw(title, x, y, plot, height=0.9 + 0.3 * len(values))] if values else []


def _some(blocks: Sequence[int], offset: float = 0.0) -> tuple[list[float], list[str]]:
    """Places and labels of some of the blocks that stand in a row."""
    shown = range(0, len(blocks), max(1, len(blocks) // 6))
    return [place + offset for place in shown], [str(blocks[place]) for place in shown]


def _whole_numbers(axes: Axes) -> None:
    """Ticks at whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
