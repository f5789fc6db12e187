"""A report as one HTML page that needs nothing else: no network, no fonts, no scripts."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from corda_kernels.errors import MissingExtraError
from corda_kernels.outputs import atomic_path
from corda_kernels.report.content import Report
from corda_kernels.report.names import printable, short
from corda_kernels.report.table import layer_table
from corda_kernels.versions import library_versions


def check_matplotlib() -> None:
    """Makes sure that charts can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError('figures need matplotlib: pip install "corda_kernels[report]"')


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
    from corda_kernels.report.figures import draw_sections

    environment = Environment(
        autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["short"] = short
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    spectra = [layer.spectrum for layer in report.layers.values() if layer.spectrum]
    return environment.from_string(source).render(
        report=report,
        table=layer_table(report),
        figures=draw_sections(report),
        partial=any(not spectrum.whole for spectrum in spectra),
        singular=sum(math.isinf(value) for value in report.conditions().values()),
        version=library_versions()["corda_kernels"],
    )


def _shown(value: Any) -> Any:
    """Text without what cannot be shown; charts, which are Markup, as they are."""
    return printable(value) if type(value) is str else value
