"""Names of layers: where in a model one stands, and how it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"(?:(.*?)\.)?([0-9]{1,6})(?:\.(.*))?", re.DOTALL)
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,6}(?![^.])")


def place(name: str) -> tuple[str, int]:
    """A layer's kind and block, by the first number in its name; further numbers become "*".

    Layers of all blocks that do the same are of one kind, such as "mlp.down_proj". Those outside of
    all blocks have block 0.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name, 0
    before, number, rest = match.groups(default="")
    return _NUMBER.sub("*", rest) or before or name, int(number)


def by_kind(names: Iterable[str], most: int = 12) -> dict[str, list[tuple[int, str]]]:
    """Block and name of the layers of each kind, ascending, in the order in which kinds first come.

    Args:
        names: of the layers.
        most: how many kinds, those that have the most layers; a model has seven or so.
    """
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        kind, block = place(name)
        kinds.setdefault(kind, []).append((block, name))
    largest = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:most]
    return {kind: sorted(entries) for kind, entries in kinds.items() if kind in largest}


def printable(text: str) -> str:
    """The text with U+FFFD for what cannot be shown, such as control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(name: str, longest: int = 30) -> str:
    """A printable name that fits: of a long one its end, which tells more."""
    name = printable(name)
    return name if len(name) <= longest else "…" + name[1 - longest :]
