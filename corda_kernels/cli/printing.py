"""What the command line prints: lines and tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from corda_kernels.report.table import Table

# In columns. No table is wrapped, in a terminal neither: half a name or number would be of no use.
_WIDEST = 1 << 20


def echo(line: str, *, err: bool = False) -> None:
    """Prints a line, to stderr with `err`.

    Names out of files stand in most lines. What would not print in them, such as the control
    characters by which a terminal is steered, is shown as an escape.
    """
    typer.echo(_escaped(line), err=err)


def show(table: Table) -> None:
    """Prints a table: title, rows and notes."""
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(table.columns):
        grid.add_column(Text(_escaped(heading)), justify="right" if number else "left")
    for row in table.rows:
        grid.add_row(*(Text(_escaped(cell)) for cell in row))
    echo(table.title)
    # Whether there are colours depends on stdout alone, not on what a log's environment asks for.
    Console(width=_WIDEST, force_terminal=sys.stdout.isatty()).print(grid)
    for note in table.notes:
        echo(note)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
