from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_kernels.errors import ConfigError, RankError
from corda_kernels.planning import allocate_ranks, parse_budget, uniform_budget
from corda_kernels.planning.ranks import check_guaranteed

MODES = ("kpm", "ipm")


def tail_score(spectrum: Sequence[float], factor: float) -> float:
    """Of the last component of a descending spectrum."""
    *remaining, smallest = spectrum
    if not remaining:
        return math.inf
    return factor * smallest / math.fsum(remaining) if smallest else 0.0


def literal_loop(
    spectra: dict[str, list[float]],
    factors: dict[str, float],
    shapes: dict[str, tuple[int, int]],
    budget: int,
    mode: str,
    rows: int = 1,
) -> dict[str, int]:
    """CorDA++'s filtering, one component at a time."""
    left = {name: list(spectrum) for name, spectrum in spectra.items()}
    filtered = dict.fromkeys(spectra, 0)

    def cost(counts: dict[str, int]) -> int:
        return rows * total(counts, shapes)

    def remaining() -> dict[str, int]:
        return {name: len(spectrum) for name, spectrum in left.items()}

    while any(left.values()):
        if mode == "ipm" and cost(remaining()) <= budget:
            break
        name = min(
            (name for name in left if left[name]),  # min takes the first of equals
            key=lambda name: tail_score(left[name], factors[name]),
        )
        if mode == "kpm" and cost(filtered) + rows * sum(shapes[name]) > budget:
            break
        left[name].pop()
        filtered[name] += 1
    return filtered if mode == "kpm" else remaining()


def allocate(
    spectra: dict[str, list[float]],
    factors: dict[str, float],
    shapes: dict[str, tuple[int, int]],
    budget: int,
    mode: Any,
    **options: Any,
) -> dict[str, int]:
    tensors = {name: torch.tensor(spectrum).double() for name, spectrum in spectra.items()}
    return allocate_ranks(tensors, factors, shapes, budget=budget, mode=mode, **options)


def total(ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> int:
    return sum(ranks[name] * sum(shapes[name]) for name in ranks)


# Few values, so that scores tie and vanish often; whole numbers, so that sums are exact.
VALUES = {
    "tied": st.sampled_from([0, 1, 1, 2, 4]),
    "integer": st.integers(0, 1000),
    "wide": st.sampled_from([0, 1, 10**3, 10**6, 10**9, 10**12]),
}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    names = [f"layer{index}" for index in range(draw(st.integers(1, 5)))]
    kind = VALUES[draw(st.sampled_from(sorted(VALUES)))]
    spectra = {
        name: [float(v) for v in sorted(draw(st.lists(kind, min_size=1, max_size=8)), reverse=True)]
        for name in names
    }
    factors = {name: draw(st.sampled_from([0.0, 1.0, 2.0, 2.5, 13.0])) for name in names}
    shapes = {
        name: (len(spectra[name]) + draw(st.integers(0, 6)), len(spectra[name])) for name in names
    }
    rows = draw(st.sampled_from([1, 2, 3]))
    everything = rows * sum(len(spectra[name]) * sum(shapes[name]) for name in names)
    budget = draw(st.sampled_from([0, everything, everything + 7, None]))
    return {
        "spectra": spectra,
        "factors": factors,
        "shapes": shapes,
        "budget": draw(st.integers(0, everything)) if budget is None else budget,
        "mode": draw(st.sampled_from(MODES)),
        "rows": rows,
    }


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(problems())
def test_one_sort_is_the_literal_loop(problem: dict[str, Any]) -> None:
    assert allocate(**problem) == literal_loop(**problem)


@pytest.mark.parametrize("mode", MODES)
def test_real_valued_spectra_are_the_literal_loop(mode: str) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        names = [f"layer{index}" for index in range(6)]
        spectra = {
            name: torch.rand(12).double().pow(1 + index).sort(descending=True).values.tolist()
            for index, name in enumerate(names)
        }
        factors = dict(zip(names, (10 * torch.rand(6)).tolist(), strict=True))
        shapes = {name: (12 + 3 * index, 20) for index, name in enumerate(names)}
        budget = int(torch.randint(0, 6 * 12 * 40, ()))
        problem = (spectra, factors, shapes, budget, mode)
        assert allocate(*problem) == literal_loop(*problem)


def test_an_example_by_hand() -> None:
    # Scores, smallest first: a 1/9, 2/7, 3/4, ∞; b 2/7, 3/4 (its last two as in a), ∞.
    spectra = {"a": [4.0, 3.0, 2.0, 1.0], "b": [4.0, 3.0, 2.0]}
    factors, shapes = {"a": 1.0, "b": 1.0}, {"a": (5, 5), "b": (4, 3)}
    granted = [
        allocate(spectra, factors, shapes, budget, "kpm") for budget in (9, 10, 20, 27, 37, 44)
    ]
    assert [tuple(ranks.values()) for ranks in granted] == [
        (0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_paid_for_each_component(mode: str) -> None:
    torch.manual_seed(0)
    spectra = {name: torch.rand(8).double().sort(descending=True).values.tolist() for name in "abc"}
    factors, shapes = {"a": 1.0, "b": 4.0, "c": 16.0}, {"a": (8, 9), "b": (8, 20), "c": (30, 8)}
    everything = 8 * (17 + 28 + 38)
    found = set()
    for budget in range(0, everything, 17):
        one = allocate(spectra, factors, shapes, budget, mode)
        for left in (0, 1):
            assert allocate(spectra, factors, shapes, 2 * budget + left, mode, rows=2) == one
        found.add(tuple(one.values()))
    assert len(found) > 10
    floor = allocate(spectra, factors, shapes, 2 * 83, mode, rows=2, min_rank=1)
    assert floor == dict.fromkeys("abc", 1)
    with pytest.raises(RankError, match="needs 166 adapter parameters over 3 layers"):
        allocate(spectra, factors, shapes, 2 * 83 - 1, mode, rows=2, min_rank=1)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_and_everything(mode: str) -> None:
    spectra, shapes = {"a": [3.0, 1.0], "b": [2.0, 0.0, 0.0]}, {"a": (2, 4), "b": (3, 3)}
    factors = {"a": 1.0, "b": 2.0}
    assert allocate(spectra, factors, shapes, 0, mode) == {"a": 0, "b": 0}
    assert allocate(spectra, factors, shapes, 30, mode) == {"a": 2, "b": 3}
    assert allocate(spectra, factors, shapes, 10**30, mode) == {"a": 2, "b": 3}
    assert allocate_ranks({}, {}, {}, budget=5, mode=mode) == {}  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 3), st.integers(1, 8), st.integers(1, 3))
def test_bounds_keep_the_budget_and_never_take_rank_away(
    problem: dict[str, Any], least: int, most: int, multiple: int
) -> None:
    shapes, budget, rows = problem["shapes"], problem.pop("budget"), problem["rows"]
    options = {"min_rank": least, "max_rank": most, "rank_multiple": multiple}
    up = -(-least // multiple) * multiple
    if most < max(up, multiple):
        with pytest.raises(ConfigError, match="raise max_rank"):
            allocate(**problem, budget=budget, **options)
        return
    sizes = {name: len(spectrum) for name, spectrum in problem["spectra"].items()}
    reach = {name: min(most, size) // multiple * multiple for name, size in sizes.items()}
    floor = {name: min(up, reach[name]) for name in sizes}
    if rows * total(floor, shapes) > budget:
        with pytest.raises(RankError, match="lower min_rank or raise the budget"):
            allocate(**problem, budget=budget, **options)
        return
    ranks = allocate(**problem, budget=budget, **options)
    assert rows * total(ranks, shapes) <= budget
    for name, rank in ranks.items():
        assert floor[name] <= rank <= reach[name]
        assert rank % multiple == 0
    # The first component that cannot be paid ends it: what is left is less than the dearest.
    if ranks != reach:
        dearest = rows * multiple * max(map(sum, shapes.values()))
        assert budget - rows * total(ranks, shapes) < dearest
    more = allocate(**problem, budget=budget + 10, **options)
    assert all(more[name] >= rank for name, rank in ranks.items())


@pytest.mark.parametrize("mode", MODES)
def test_a_cap_passes_its_share_on_in_the_same_order(mode: str) -> None:
    torch.manual_seed(0)
    spectra = {
        name: torch.rand(20).double().sort(descending=True).values.tolist() for name in "abc"
    }
    factors, shapes = {"a": 1.0, "b": 4.0, "c": 16.0}, dict.fromkeys("abc", (20, 20))
    free = allocate(spectra, factors, shapes, 40 * 30, mode)
    cap = max(free.values()) - 2
    bounded = allocate(spectra, factors, shapes, 40 * 30, mode, max_rank=cap)
    assert sum(bounded.values()) == sum(free.values()) == 30
    assert bounded != free
    assert max(bounded.values()) == cap
    assert all(bounded[name] >= min(free[name], cap) for name in "abc")


def test_three_hundred_layers_of_4096_components() -> None:
    spectrum = torch.linspace(1, 1e-4, 4096).double()
    names = [f"layer{index}" for index in range(300)]
    spectra = {name: spectrum.pow(1 + index / 100) for index, name in enumerate(names)}
    shapes = dict.fromkeys(names, (4096, 4096))
    ranks = allocate_ranks(
        spectra, dict.fromkeys(names, 12.0), shapes, budget=300 * 128 * 8192, mode="kpm"
    )
    assert sum(ranks.values()) == 300 * 128


GOOD: dict[str, Any] = {
    "spectra": {"a": torch.tensor([2.0, 1.0])},
    "log_condition": {"a": 1.0},
    "shapes": {"a": (2, 3)},
    "budget": 5,
}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"budget": -1}, ConfigError, "budget must be a whole number"),
        ({"budget": 1.5}, ConfigError, "budget must be a whole number"),
        ({"mode": "other"}, ConfigError, '"kpm" or "ipm"'),
        ({"min_rank": -1}, ConfigError, "min_rank"),
        ({"rank_multiple": 0}, ConfigError, "rank_multiple"),
        ({"max_rank": 0}, ConfigError, "raise max_rank to 1"),
        ({"max_rank": 3, "rank_multiple": 4}, ConfigError, "raise max_rank to 4"),
        ({"min_rank": 2}, RankError, "needs 10 adapter parameters"),
        ({"shapes": {}}, ConfigError, "layer a is in spectra but not in shapes"),
        ({"log_condition": {"a": 1.0, "b": 1.0}}, ConfigError, "layer b is in log_condition"),
        ({"log_condition": {"a": math.inf}}, ConfigError, "layer a: its log condition"),
        ({"log_condition": {"a": -0.1}}, ConfigError, "layer a: its log condition"),
        ({"shapes": {"a": (1, 3)}}, RankError, "layer a: 2 singular values"),
        ({"spectra": {"a": torch.tensor([1.0, 2.0])}}, ConfigError, "descending"),
        ({"spectra": {"a": torch.tensor([1.0, -1.0])}}, ConfigError, "descending"),
        ({"spectra": {"a": torch.tensor([math.nan, 1.0])}}, ConfigError, "NaN"),
        ({"spectra": {"a": torch.ones(1, 2)}}, ConfigError, "is a vector"),
        ({"spectra": {"a": torch.ones(0)}}, ConfigError, "is a vector"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    assert allocate_ranks(**GOOD) == {"a": 1}
    with pytest.raises(error, match=says):
        allocate_ranks(**(GOOD | change))


SHAPES = {"a": (10, 20), "b": (4, 6)}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2500000", 2_500_000),
        ("2_500_000", 2_500_000),
        (7, 7),
        ("1", 1),
        ("1.0", 1000),
        (1.0, 1000),
        ("0.29", 290),
        ("29%", 290),
        ("100%", 1000),
        ("0.0015", 1),
        (1e-3, 1),
        ("r=3", 3 * 30 + 3 * 10),
        (" r = 8 ", 8 * 30 + 4 * 10),
    ],
)
def test_a_budget_is_read_as_it_is_written(written: Any, meant: int) -> None:
    assert parse_budget(written, SHAPES, 1000) == meant


@pytest.mark.parametrize("written", ["7", "2_500_000", "29%", "1.0", "0.0015"])
def test_parameters_and_shares_are_the_same_whatever_a_component_takes(written: str) -> None:
    assert parse_budget(written, SHAPES, 1000, rows=2) == parse_budget(written, SHAPES, 1000)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_budget_of_a_rank_has_all_its_rows(rows: int) -> None:
    assert parse_budget("r=3", SHAPES, 1000, rows) == rows * (3 * 30 + 3 * 10)
    assert parse_budget("r=8", SHAPES, 1000, rows) == rows * (8 * 30 + 4 * 10)
    assert uniform_budget(SHAPES, 8, rows) == rows * (8 * 30 + 4 * 10)


@pytest.mark.parametrize(
    ("bounds", "needed"),
    [
        ((3, None, 1), 3 * 30 + 3 * 10),
        ((6, None, 1), 6 * 30 + 4 * 10),
        ((3, 8, 4), 4 * 30 + 4 * 10),
        ((3, None, 5), 5 * 30),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_guaranteed_is_paid_with_all_its_rows(
    bounds: tuple[int, int | None, int], needed: int, rows: int
) -> None:
    check_guaranteed(SHAPES, rows * needed, *bounds, rows)
    with pytest.raises(RankError, match=f"needs {rows * needed} adapter parameters over 2 lay"):
        check_guaranteed(SHAPES, rows * needed - 1, *bounds, rows)


@pytest.mark.parametrize(("multiple", "price"), [(1, 10), (4, 4 * 10), (5, 5 * 30)])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_budget_pays_for_the_cheapest_components_at_least(
    multiple: int, price: int, rows: int
) -> None:
    check_guaranteed(SHAPES, rows * price, 0, None, multiple, rows)
    with pytest.raises(RankError, match=f"pays for nothing.* take {rows * price}:"):
        check_guaranteed(SHAPES, rows * price - 1, 0, None, multiple, rows)
    with pytest.raises(RankError, match=r"rank_multiple 11 .* at most 10"):
        check_guaranteed(SHAPES, 10**6, 0, None, 11, rows)


@pytest.mark.parametrize(
    "written", ["0", "-1", "0.0", "1.5", "101%", "50 %%", "r=", "r=0", "many", "", "nan", "1e3"]
)
def test_what_is_no_budget(written: str) -> None:
    with pytest.raises(ConfigError):
        parse_budget(written, SHAPES, 1000)


def test_the_uniform_budget_is_what_the_uniform_rank_costs() -> None:
    assert uniform_budget(SHAPES, 4) == 4 * 30 + 4 * 10
    assert uniform_budget(SHAPES, 100) == 10 * 30 + 4 * 10
    for rank, mode in itertools.product((1, 4), MODES):
        flat: dict[str, Tensor] = {name: torch.ones(min(shape)) for name, shape in SHAPES.items()}
        ranks = allocate_ranks(
            flat, dict.fromkeys(flat, 1.0), SHAPES, budget=uniform_budget(SHAPES, rank), mode=mode
        )
        assert total(ranks, SHAPES) <= uniform_budget(SHAPES, rank)
