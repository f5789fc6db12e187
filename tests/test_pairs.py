from __future__ import annotations

import itertools

from pairs import pairs


def test_every_two_values_meet_in_few_cases() -> None:
    options = [range(7), "ab", [None, 1, 2], (True, False)]
    found = pairs(*options)
    assert len(found) <= 24  # 21 are needed, and the whole grid has 84
    for i, j in itertools.combinations(range(4), 2):
        assert {(case[i], case[j]) for case in found} == set(
            itertools.product(options[i], options[j])
        )


def test_two_options_are_their_whole_grid() -> None:
    assert pairs("ab", [1, 2]) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
