"""Names in a page."""

from __future__ import annotations

import html

_LONGEST_NAME = 30


def printable(text: str) -> str:
    """The text with U+FFFD for what cannot be shown, such as control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def escaped(text: str) -> str:
    """Printable, and safe in HTML's text and attributes."""
    return html.escape(printable(text))


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    """A printable name that fits: of a long one its end, which tells more."""
    name = printable(name)
    return name if len(name) <= longest else "…" + name[1 - longest :]
