"""Small charts as inline SVG, drawn by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_kernels.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches. A page shows a chart some 340 pixels wide, on a phone too, so that text keeps its size.
_WIDTH, _HEIGHT = 3.5, 2.5

# Okabe and Ito's colours, which the colour-blind can tell apart, those first that stand out on
# white; and markers, so that no line depends on its colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it; wider than what a page will take
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "corda_kernels",
    "text.parse_math": False,  # names of layers are not mathematics
}


@dataclass(frozen=True)
class Panel:
    """A chart.

    Attributes:
        title: what it is of.
        alt: what it shows, for those who do not see it.
        svg: the element, without the names that would clash with those of other charts.
    """

    title: str
    alt: str
    svg: str


def check_matplotlib() -> None:
    """Makes sure that charts can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            "the report's figures need matplotlib, which is not installed; get it by: "
            'pip install "corda_kernels[report]"'
        )


def draw(
    title: str,
    x: str,
    y: str,
    plot: Callable[[Axes], str | None],
    *,
    height: float = _HEIGHT,
) -> Panel:
    """Draws one chart.

    Args:
        title: what it is of.
        x: what the horizontal axis shows, with its unit in brackets.
        y: the vertical one.
        plot: draws into the axes; may return what to add to the description.
        height: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_axisbelow(True)
        said = plot(axes)
        axes.set_xlabel(x, gid="x-unit")
        axes.set_ylabel(y, gid="y-unit")
        written = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():
            # A browser has more fonts.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(written, format="svg", transparent=True, metadata=metadata)
    alt = f"{title}: {y} against {x}" + (f"; {said}" if said else "")
    return Panel(title, alt, _inlined(written.getvalue()))


_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_NEEDLESS = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", re.DOTALL)
_NAMESPACE = re.compile(r' xmlns(:\w+)?="[^"]*"')
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"')
_COORDINATES = re.compile(r'\b(?:d|x|y|transform)="[^"]*"')
_DIGITS = re.compile(r"(\.\d\d)\d+")
_GAPS = re.compile(r">\s+<")
_GROUP_NAME = re.compile(r'(<g) id="(?![xy]-unit)[^"]*"')


def _inlined(document: str) -> str:
    """The element of an SVG document, for use inside HTML, in fewer bytes."""
    svg = _NEEDLESS.sub("", _PROLOGUE.sub("", document))
    svg = _GROUP_NAME.sub(r"\1", _SIZE.sub(r"\1", _NAMESPACE.sub("", svg)))
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "")  # the page's own
    svg = svg.replace('id="x-unit"', 'class="x-unit"').replace('id="y-unit"', 'class="y-unit"')
    svg = _COORDINATES.sub(lambda match: _DIGITS.sub(r"\1", match[0]).replace(" \n", " "), svg)
    return _GAPS.sub("><", svg).strip()


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis: 1e-3 gives 10⁻³, and what is no power of ten nothing."""
    if value <= 0:
        return ""
    exponent = math.log10(value)
    if abs(exponent - round(exponent)) > 1e-6:
        return ""
    if -2 <= round(exponent) <= 3:
        return f"{value:g}"
    return "10" + str(round(exponent)).translate(_SUPERSCRIPTS)


def logarithmic(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axis = axes.yaxis
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(power_of_ten))
    axis.set_minor_formatter(NullFormatter())
