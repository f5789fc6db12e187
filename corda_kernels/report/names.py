"""Names of layers: where in a model one stands, and how it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_BLOCK = re.compile(r"(?:(.*?)\.)?([0-9]{1,6})(?:\.(.*))?", re.DOTALL)
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,6}(?![^.])")


class Place(NamedTuple):
    """A layer's place.

    Attributes:
        kind: what the layers of all blocks that do the same are called, such as "mlp.down_proj".
        block: number of the block, 0 for layers outside of all.
    """

    kind: str
    block: int


def place(name: str) -> Place:
    """The place of a layer, by the first number in its name; further numbers become "*"."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return Place(name, 0)
    before, number, rest = match.groups(default="")
    return Place(_NUMBER.sub("*", rest) or before or name, int(number))


def by_kind(names: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """Block and name of the layers of each kind, in the order in which kinds first come."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        kind, block = place(name)
        kinds.setdefault(kind, []).append((block, name))
    return kinds


def printable(text: str) -> str:
    """The text with U+FFFD for what cannot be shown, such as control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(name: str, longest: int = 30) -> str:
    """A printable name that fits: of a long one its end, which tells more."""
    name = printable(name)
    return name if len(name) <= longest else "…" + name[1 - longest :]
