"""The charts of a report, section by section."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corda_kernels.report.content import Input, Report, Spectrum
from corda_kernels.report.drawing import COLOURS, MARKERS, Panel, draw, logarithmic
from corda_kernels.report.names import by_kind
from corda_kernels.report.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCK = "block (number)"
# Kinds of layers with a chart, or a line in one; a model has seven or so.
_MOST_KINDS = 12
_MOST_LINES = 7
# The verdicts' colours differ in lightness too.
_VERDICTS = {"stable": "#2c7fb8", "fair": "#fec44f", "unstable": "#a50f15"}
_STAGES = ("calibration", "stability", "selection", "allocation", "decomposition")
_SHARES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


def kinds_shown(names: Iterable[str], most: int = _MOST_KINDS) -> dict[str, list[tuple[int, str]]]:
    """The kinds that have the most layers, in the model's order: block and name of each."""
    kinds = by_kind(names)
    largest = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:most]
    return {kind: entries for kind, entries in kinds.items() if kind in largest}


def rank_panels(report: Report) -> list[Panel]:
    """Ranks of a budget by block, against the uniform rank; nothing without a budget."""
    if not report.allocation:
        return []
    uniform = report.uniform_rank()
    top = max(layer.rank or 0 for layer in report.layers.values())

    def panel(kind: str, entries: list[tuple[int, str]]) -> Panel:
        ranks = [report.layers[name].rank or 0 for _, name in entries]

        def plot(axes: Axes) -> str:
            axes.bar([block for block, _ in entries], ranks, width=0.8, color=COLOURS[0])
            if uniform is not None:
                axes.axhline(uniform, color=COLOURS[1], linestyle="--", linewidth=1)
                # Above the bars, which may be higher than the line.
                axes.set_title(f"dashed: uniform rank {uniform:.3g}", loc="right", fontsize=7)
            axes.set_ylim(0, 1.08 * max(top, uniform or 0))
            _whole_numbers(axes)
            return f"from {min(ranks)} to {max(ranks)}"

        return draw(short(kind), _BLOCK, "rank (components)", plot)

    return [panel(*item) for item in kinds_shown(report.layers).items()]


def spectrum_panels(report: Report) -> list[Panel]:
    """Singular values of W·C over the largest known one, one line a block."""
    known = {name: layer.spectrum for name, layer in report.layers.items() if layer.spectrum}
    whole = all(spectrum.index[0] == 0 for spectrum in known.values())
    y = "σ / σmax (ratio)" if whole else "σ / largest σ trained (ratio)"
    return _spectra(known, "component, from the largest (share of all)", y)


def eigenvalue_panels(report: Report) -> list[Panel]:
    """Eigenvalues of C over their mean, one line a block."""
    known = {e.layers[0]: e.spectrum for e in report.inputs if e.layers and e.spectrum}
    x, y = "eigenvalue, from the largest (share of all)", "λ / mean λ (ratio)"
    return _spectra(known, x, y, relative=False, title=_input_title)


def _spectra(
    known: Mapping[str, Spectrum],
    x: str,
    y: str,
    *,
    relative: bool = True,
    title: Callable[[str], str] | None = None,
) -> list[Panel]:
    lines = {
        name: _line(spectrum, spectrum.value[0] if relative else 1.0)
        for name, spectrum in known.items()
    }
    lines = {name: line for name, line in lines.items() if line[0]}
    if not lines:
        return []
    shares = [share for line in lines.values() for share in line[0]]
    values = [value for line in lines.values() for value in line[1]]
    # All charts on the same axes, so that they can be compared.
    limits = (_shares(min(shares), max(shares)), (min(values) / 2, max(values) * 2))
    return [
        _spectrum_panel(title(kind) if title else short(kind), x, y, entries, lines, limits)
        for kind, entries in kinds_shown(lines).items()
    ]


def _line(spectrum: Spectrum, unit: float) -> tuple[list[float], list[float]]:
    """Shares of all components, in the middle of each, and values; those of zero are left out."""
    points = [
        ((index + 0.5) / spectrum.total, value / unit)
        for index, value in zip(spectrum.index, spectrum.value, strict=True)
        if value > 0 and unit > 0
    ]
    return [share for share, _ in points], [value for _, value in points]


def _spectrum_panel(
    title: str,
    x: str,
    y: str,
    entries: list[tuple[int, str]],
    lines: Mapping[str, tuple[list[float], list[float]]],
    limits: tuple[tuple[float, float], tuple[float, float]],
) -> Panel:
    def plot(axes: Axes) -> str:
        from matplotlib import colormaps
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

        blocks = sorted(block for block, _ in entries)
        first, last = blocks[0], blocks[-1]
        for block, name in entries:
            along = (block - first) / max(last - first, 1)
            label = None
            if block in (first, last) and name == _first_of(entries, block):
                label = f"block {block}"
            # Its upper end is too pale for white paper.
            axes.plot(*lines[name], color=colormaps["viridis"](0.82 * along), label=label, lw=0.8)
        axes.set_xscale("logit")
        axes.xaxis.set_major_locator(FixedLocator(_ticks(limits[0])))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.set_xlim(limits[0])
        logarithmic(axes)
        axes.set_ylim(limits[1])
        axes.legend(loc="best", handlelength=1.2)
        falls = [values[0] / values[-1] for _, values in (lines[name] for _, name in entries)]
        return f"falling by a factor of {statistics.median(falls):.2g} in the median layer"

    return draw(title, x, y, plot)


def _first_of(entries: list[tuple[int, str]], block: int) -> str:
    return next(name for number, name in entries if number == block)


def _shares(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis of shares that leave a little room on both sides."""
    ends = math.log(low / (1 - low)), math.log(high / (1 - high))
    room = 0.03 * (ends[1] - ends[0]) + 0.1
    first, last = (1 / (1 + math.exp(-at)) for at in (ends[0] - room, ends[1] + room))
    return first, last


def _ticks(limits: tuple[float, float]) -> list[float]:
    """Shares to label: round ones within the limits, and finer ones where few of those are."""
    inside = [share for share in _SHARES if limits[0] <= share <= limits[1]]
    if len(inside) >= 3:
        return inside
    low, high = (math.log(limit / (1 - limit)) for limit in limits)
    places = [low + (high - low) * step / 8 for step in (1, 3, 5, 7)]
    return [float(f"{1 / (1 + math.exp(-at)):.1g}") for at in places]


def condition_panels(report: Report) -> list[Panel]:
    """λmax/λmin of C, and σmax/σmin of W·C, by block."""
    of_inputs = {name: value for name, value in report.conditions().items() if math.isfinite(value)}
    inputs = report.input_of()
    # Layers that read one input share its condition: the first of them stands for all.
    shown = {
        name: value
        for name, value in of_inputs.items()
        if name not in inputs or inputs[name].layers[0] == name
    }
    of_layers = {
        name: layer.spectrum.condition
        for name, layer in report.layers.items()
        if layer.spectrum is not None and layer.spectrum.condition is not None
    }
    panels = []
    if shown:
        panels.append(_by_block("C, the inputs", "λmax / λmin (ratio)", shown))
    if of_layers:
        panels.append(_by_block("W·C, the layers", "σmax / σmin (ratio)", of_layers))
    return panels


def _by_block(title: str, y: str, values: Mapping[str, float], *, log: bool = True) -> Panel:
    """A line a kind over the blocks."""

    def plot(axes: Axes) -> str:
        for number, (kind, entries) in enumerate(kinds_shown(values, _MOST_LINES).items()):
            entries = sorted(entries)
            axes.plot(
                [block for block, _ in entries],
                [values[name] for _, name in entries],
                color=COLOURS[number],
                marker=MARKERS[number],
                linewidth=0.7,
                label=short(kind),
            )
        if log:
            logarithmic(axes)
        _whole_numbers(axes)
        _legend_below(axes)
        return f"from {min(values.values()):.2g} to {max(values.values()):.2g}"

    return draw(title, _BLOCK, y, plot, height=3.1)


def outlier_panels(report: Report) -> list[Panel]:
    """Channels whose inputs are far larger than those of the median channel."""
    known = {e.layers[0]: e for e in report.inputs if e.layers and e.absmax and e.median > 0}
    if not known:
        return []
    peak = max(max(entry.absmax) / entry.median for entry in known.values())
    return [
        _outlier_panel(kind, [(block, known[name]) for block, name in entries], peak)
        for kind, entries in kinds_shown(known).items()
    ]


def _outlier_panel(kind: str, entries: list[tuple[int, Input]], peak: float) -> Panel:
    entries = sorted(entries, key=lambda entry: entry[0])
    channels = max(entry.channels for _, entry in entries)
    runs = max(len(entry.absmax) for _, entry in entries)

    def plot(axes: Axes) -> str:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        rows = [[value / entry.median for value in entry.absmax] for _, entry in entries]
        rows = [row + [math.nan] * (runs - len(row)) for row in rows]
        image = axes.imshow(
            rows,
            aspect="auto",
            interpolation="nearest",
            cmap="magma_r",
            norm=LogNorm(1, max(peak, 10), clip=True),
            extent=(0, channels, len(rows) - 0.5, -0.5),
        )
        axes.grid(False)
        _number_rows(axes, [block for block, _ in entries])
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
        bar.set_label("|x| max / median channel's (ratio)", fontsize=7)
        steps = [10.0**step for step in range(1 + math.floor(math.log10(max(peak, 10))))]
        bar.ax.yaxis.set_major_locator(FixedLocator(steps))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        bar.outline.set_linewidth(0.4)
        strongest = max(entries, key=lambda item: max(item[1].absmax) / item[1].median)
        times = max(strongest[1].absmax) / strongest[1].median
        return f"at most {times:.3g} times, channel {strongest[1].channel} of block {strongest[0]}"

    return draw(_input_title(kind), "channel (number)", _BLOCK, plot, height=2.7)


def selection_panels(report: Report) -> list[Panel]:
    """Scores of the candidates by input, the chosen one filled; and how often each was chosen."""
    selection = report.selection
    if selection is None or selection.rounds < 2:
        return []
    winners, totals = selection.winners(), selection.totals()
    scores = {
        names[0]: total for names, total in zip(selection.groups, totals, strict=True) if names
    }
    chosen = [winners[name] for name in scores]
    counts = [chosen.count(candidate) for candidate in range(selection.rounds)]

    def wins(axes: Axes) -> str:
        bars = axes.bar(range(1, len(counts) + 1), counts, color=COLOURS[0], width=0.6)
        axes.bar_label(bars, fontsize=7, padding=1)
        axes.margins(y=0.12)
        _whole_numbers(axes, also_y=True)
        return ", ".join(f"candidate {number} {count}" for number, count in enumerate(counts, 1))

    panels = [draw("Lowest score", "candidate (number)", "inputs (count)", wins)]
    for kind, entries in kinds_shown(scores).items():
        panels.append(_score_panel(kind, entries, scores, winners))
    return panels


def _score_panel(
    kind: str,
    entries: list[tuple[int, str]],
    scores: Mapping[str, list[float]],
    winners: Mapping[str, int],
) -> Panel:
    def plot(axes: Axes) -> str:
        spreads = []
        for block, name in entries:
            mean = statistics.fmean(scores[name]) or 1.0
            relative = [100 * (score / mean - 1) for score in scores[name]]
            spreads.append(max(relative) - min(relative))
            best = winners[name]
            others = relative[:best] + relative[best + 1 :]
            axes.vlines(block, min(relative), max(relative), color="#bbbbbb", linewidth=0.8)
            axes.plot([block] * len(others), others, "o", mfc="white", mec="#555555", ms=3, mew=0.6)
            axes.plot([block], [relative[best]], "D", color=COLOURS[1], ms=3.5)
        _handles(axes, {"chosen": ("D", COLOURS[1], COLOURS[1]), "others": ("o", "white", "#555")})
        _whole_numbers(axes)
        return f"candidates lie apart by {statistics.median(spreads):.2g} % in the median block"

    return draw(_input_title(kind), _BLOCK, "score over its mean − 1 (%)", plot)


def stability_panels(report: Report) -> list[Panel]:
    """Verdict of every layer, and the numbers behind it."""
    stability = report.stability
    if stability is None or not stability.layers:
        return []
    panels = [_verdict_panel({n: stability.verdict(e) for n, e in stability.layers.items()})]
    for title, field in (("Largest components", "top"), ("Smallest components", "bottom")):
        values = {
            name: value
            for name, layer in stability.layers.items()
            if (value := getattr(layer, field)) is not None
        }
        if values:
            panels.append(_by_block(title, "agreement of the halves (0 … 1)", values, log=False))
    return panels


def _verdict_panel(verdicts: Mapping[str, str]) -> Panel:
    kinds = kinds_shown(verdicts)
    order = list(_VERDICTS)

    def plot(axes: Axes) -> str:
        from matplotlib.colors import ListedColormap

        blocks = sorted({block for entries in kinds.values() for block, _ in entries})
        column = {block: number for number, block in enumerate(blocks)}
        rows = [[math.nan] * len(blocks) for _ in kinds]
        for row, entries in zip(rows, kinds.values(), strict=True):
            for block, name in entries:
                grade = order.index(verdicts[name])
                # Experts of one block share a cell: it shows the worst.
                before = row[column[block]]
                row[column[block]] = grade if math.isnan(before) else max(before, grade)
        cells = axes.pcolormesh(
            rows, cmap=ListedColormap(list(_VERDICTS.values())), vmin=-0.5, vmax=2.5,
            edgecolors="white", linewidth=0.4,
        )  # fmt: skip
        cells.set_rasterized(False)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], [short(k, 20) for k in kinds])
        step = max(1, len(blocks) // 6)
        shown = range(0, len(blocks), step)
        axes.set_xticks([n + 0.5 for n in shown], [str(blocks[n]) for n in shown])
        _handles(
            axes,
            {verdict: ("s", colour, colour) for verdict, colour in _VERDICTS.items()},
            below=True,
        )
        found = list(verdicts.values())
        return ", ".join(f"{found.count(verdict)} {verdict}" for verdict in order)

    height = 1.2 + 0.2 * len(kinds)
    return draw("Verdict by layer", _BLOCK, "layer (kind)", plot, height=height)


def time_panels(report: Report) -> list[Panel]:
    """Seconds by stage, and memory."""
    panels = []
    seconds = {stage: report.seconds[stage] for stage in _STAGES if stage in report.seconds}
    if seconds:
        panels.append(_bars("Time", "time (seconds)", "stage (name)", seconds))
    mebibytes = {what: size / 2**20 for what, size in report.memory.items() if size}
    if mebibytes:
        panels.append(_bars("Memory", "memory (MiB)", "use (name)", mebibytes))
    return panels


def _bars(title: str, x: str, y: str, values: Mapping[str, float]) -> Panel:
    def plot(axes: Axes) -> str:
        from matplotlib.ticker import MaxNLocator

        bars = axes.barh(range(len(values)), list(values.values()), color=COLOURS[0], height=0.6)
        axes.bar_label(bars, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
                              for value in values.values()], fontsize=7, padding=2)  # fmt: skip
        axes.set_yticks(range(len(values)), [short(name, 24) for name in values])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        return ", ".join(f"{name} {value:,.3g}" for name, value in values.items())

    return draw(title, x, y, plot, height=0.9 + 0.3 * len(values))


def _input_title(kind: str) -> str:
    return f"Input of {short(kind)}"


def _number_rows(axes: Axes, blocks: Sequence[int]) -> None:
    step = max(1, len(blocks) // 6)
    shown = range(0, len(blocks), step)
    axes.set_yticks(list(shown), [str(blocks[row]) for row in shown])


def _whole_numbers(axes: Axes, *, also_y: bool = False) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if also_y:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _legend_below(axes: Axes) -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, handlelength=1.4,
        columnspacing=1.0,
    )  # fmt: skip


def _handles(
    axes: Axes, entries: Mapping[str, tuple[str, str, str]], *, below: bool = False
) -> None:
    """A legend of markers: label → marker, fill and edge."""
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], linestyle="none", marker=marker, mfc=fill, mec=edge, ms=4, label=label)
        for label, (marker, fill, edge) in entries.items()
    ]
    if below:
        axes.figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    else:
        axes.legend(handles=handles, loc="best", ncols=2, handletextpad=0.1, columnspacing=0.8)
