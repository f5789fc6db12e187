"""A selection from a grid of test cases in which every two values of two axes meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over fewer rows than the product of the axes, chosen greedily."""
    rows = list(itertools.product(*(range(len(values)) for values in axes.values())))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    cases = [
        tuple(values[index] for values, index in zip(axes.values(), row, strict=True))
        for row in chosen
    ]
    return pytest.mark.parametrize(tuple(axes), cases, ids=str)
