"""How tiles of C and tokens of X are shared out among programs that run side by side."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# Tokens that a program takes at least.
_SHORTEST_PART = 512


class Shares(NamedTuple):
    """The programs of one launch.

    Tokens are in spans of `chain`, and a unit is one tile on one span. The first `whole` programs
    take one unit each; each other unit is cut into `pieces` programs of `part` tokens.
    """

    tiles: int
    whole: int
    pieces: int
    chain: int
    part: int

    def programs(self, n: int) -> int:
        """How many there are for n tokens."""
        units = self.tiles * math.ceil(n / self.chain)
        return self.whole + self.pieces * (units - self.whole)


@functools.lru_cache(maxsize=4096)
def divided(n: int, tiles: int, step: int, longest: int, processors: int, epilogue: int) -> Shares:
    """The shares by which all ends soonest, as one program at a time on each processor would.

    Args:
        n: tokens.
        tiles: of C.
        step: tokens that a program takes at once.
        longest: tokens of a chain at most.
        processors: with 0 each tile is one program's.
        epilogue: tokens that take as long as adding a tile to C.
    """
    chain = _stepped(n / math.ceil(n / longest), step)
    units = tiles * math.ceil(n / chain)
    if not processors:
        return Shares(tiles, units, 1, chain, chain)
    best, least = Shares(tiles, 0, 1, chain, chain), math.inf
    rounds = units // processors  # of programs that fill the device
    for whole in {max(rounds - 1, 0), rounds}:
        others = units - whole * processors
        for pieces in range(1, max(1, chain // _SHORTEST_PART) + 1):
            part = _stepped(chain / pieces, step)
            last = math.ceil(others * pieces / processors)
            tokens = whole * (chain + epilogue) + last * (part + epilogue)
            if tokens < least:
                best = Shares(tiles, whole * processors, pieces, chain, part)
                least = tokens
    return best


def _stepped(tokens: float, step: int) -> int:
    return math.ceil(tokens / step) * step
