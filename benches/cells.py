"""What tables in Markdown are made of: rows, notes, and numbers with their units."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

Results = dict[str, Any]
_MIB = 2**20
_WIDTH = 108  # of the documents
_LIBRARIES = ("torch", "transformers", "peft")
EMPTY = "–"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first `text` columns are aligned left, the others right."""
    rules = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rules, *rows))


def notes(*sentences: str) -> str:
    """What stands below a table."""
    said = " ".join(filter(None, sentences))
    return "\n\n" + textwrap.fill(said, _WIDTH, break_long_words=False)


def measured_on(*results: Results) -> str:
    """A sentence for each machine that the results were made on."""
    lines = []
    for each in results:
        about = each["environment"]
        versions = ", ".join(f"{name} {about['versions'][name]}" for name in _LIBRARIES)
        where = about["machine"]
        if about["device"] != "cpu":
            where += f", {about['device']}"
        threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
        lines.append(f"Measured on {where}, {threads}; {versions}.")
    return " ".join(dict.fromkeys(lines))


def model_name(source: str) -> str:
    """The last part of a folder or hub id: where it lay is nobody's business."""
    return source.rstrip("/").rpartition("/")[2]


def seconds(timing: dict[str, float] | None) -> str:
    """The median; nothing of what is wrong."""
    if timing is None:
        return EMPTY
    value = timing["p50"]
    if value >= 1:
        return f"{value:.1f} s"
    return f"{1e3 * value:.0f} ms" if value >= 0.01 else f"{1e3 * value:.2f} ms"


def ratio(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.2f}"


def mebibytes(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB"


def relative(error: float | None) -> str:
    return "not checked" if error is None else f"{error:.1e}"


def end_error(which: str, error: float | None) -> str:
    """Of B A for the largest; for the smallest the norm of the tail over the least possible."""
    if error is None or which == "largest":
        return relative(error)
    return f"1 + {error - 1:.1e}"
