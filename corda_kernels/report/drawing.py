"""Small charts as inline SVG, drawn by matplotlib; imported for pages only."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from corda_kernels.report.names import printable

# In inches. A page shows a chart some 340 pixels wide, on a phone too, so that text keeps its size.
_WIDTH, _HEIGHT = 3.5, 2.5

# Okabe and Ito's colours, which the colour-blind can tell apart, those first that stand out on
# white; and markers, so that no line depends on its colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Panel:
    """A chart.

    Attributes:
        title: what it is of.
        svg: the element, which says what it shows to those who do not see it.
    """

    title: str
    svg: Markup


def draw(
    title: str, x: str, y: str, plot: Callable[[Axes], str], *, height: float = _HEIGHT
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
    alt = printable(f"{title}: {y} against {x}; {plot(axes)}")
    axes.set_xlabel(x, gid="x-unit")
    axes.set_ylabel(y, gid="y-unit")
    written = io.StringIO()
    # The salt keeps names inside the element from meeting those of the page's other charts.
    with rc_context({"svg.hashsalt": alt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has more fonts
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=metadata)
    head = Markup('<svg role="img" aria-label="{}"').format(alt)
    return Panel(title, Markup(_inlined(written.getvalue()).replace("<svg", head, 1)))


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


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis: 1e-3 gives 10⁻³, and what is no power of ten nothing."""
    exponent = round(math.log10(value)) if value > 0 else 0
    if not math.isclose(value, 10.0**exponent, rel_tol=1e-6):
        return ""
    return f"{value:g}" if -2 <= exponent <= 3 else "10" + str(exponent).translate(_SUPERSCRIPTS)


def logarithmic(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(power_of_ten)
    axes.yaxis.set_minor_formatter(NullFormatter())
