"""What the command line prints, a line at a time."""

from __future__ import annotations

import typer


def echo(line: str, *, err: bool = False) -> None:
    """Prints a line, to stderr with `err`.

    Names out of files stand in most lines. What would not print in them, such as the control
    characters by which a terminal is steered, is shown as an escape.
    """
    typer.echo(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line),
        err=err,
    )
