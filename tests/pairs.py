"""Few cases of a large grid: every two values of different options meet in at least one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairs(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """One value of each option per case; a case is the one that adds the most new pairs.

    Equivalent to `itertools.product` for two options.
    """
    columns = list(itertools.combinations(range(len(options)), 2))

    def met(case: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, j, case[i], case[j]) for i, j in columns}

    grid = list(itertools.product(*(range(len(option)) for option in options)))
    missing = set().union(*map(met, grid))
    chosen = []
    while missing:
        best = max(grid, key=lambda case: len(met(case) & missing))
        missing -= met(best)
        chosen.append(best)
    return [
        tuple(option[index] for option, index in zip(options, case, strict=True))
        for case in sorted(chosen)
    ]


def pairwise(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over the pairs of named options."""
    return pytest.mark.parametrize(tuple(axes), pairs(*axes.values()), ids=str)
