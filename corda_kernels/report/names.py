"""Where in a model a layer stands, by its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


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
    parts = name.split(".")
    numbered = [part.isascii() and part.isdigit() and len(part) < 7 for part in parts]
    if not any(numbered):
        return Place(name, 0)
    first = numbered.index(True)
    rest = [
        "*" if number else part
        for part, number in zip(parts[first + 1 :], numbered[first + 1 :], strict=True)
    ]
    return Place(".".join(rest) or ".".join(parts[:first]) or name, int(parts[first]))


def by_kind(names: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """Block and name of the layers of each kind, in the order in which kinds first come."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        kind, block = place(name)
        kinds.setdefault(kind, []).append((block, name))
    return kinds
