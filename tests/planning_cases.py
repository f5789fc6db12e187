"""What functions of `corda_kernels.planning` take and refuse; test_arguments.py tries it."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import nn
from wrong_arguments import (
    CHOICES,
    COUNTS,
    DAMPINGS,
    FINITE,
    INF,
    LONG,
    NAN,
    OTHERS,
    WHOLE,
    Case,
    covariance,
    covariance_set,
    odd_tensors,
    stability_of,
)

import corda_kernels as ck
from corda_kernels.planning import (
    Stability,
    drift_weights,
    parse_budget,
    subspace_stability,
    uniform_budget,
)
from corda_kernels.planning.stability import LayerStability

SPECTRUM = torch.tensor([2.0, 1.0])
PLANNING: dict[str, Case] = {
    "allocate_ranks": Case(
        ck.allocate_ranks,
        lambda w: {
            "spectra": {"a": SPECTRUM},
            "log_condition": {"a": 1.0},
            "shapes": {"a": (2, 3)},
            "budget": 5,
        },
        {
            "spectra": [*OTHERS, *({"a": each} for each in odd_tensors(SPECTRUM))],
            "log_condition": [*OTHERS, *({"a": each} for each in FINITE)],
            "shapes": [*OTHERS, {"a": (2,)}, {"a": "23"}, {"a": (2.5, 3)}, {"a": 6}, {"a": (0, 3)}],
            "budget": [*WHOLE, None, -1],
            "mode": CHOICES,
            "min_rank": [*WHOLE, -1, LONG],
            "max_rank": [*COUNTS, LONG],
            "rank_multiple": [*COUNTS, None, LONG],
            "rows": [*COUNTS, None, LONG],
        },
    ),
    "parse_budget": Case(
        parse_budget,
        lambda w: {"value": "1%", "shapes": {"a": (2, 3)}, "total_parameters": 100},
        {
            "value": [
                *(True, None, NAN, INF, -INF, 1e400, 1.5, -1, 0, 1j, [5], b"5", LONG),
                *("nan", "nan%", "inf", "-1", "1e400", "1e9999999%", "1e-9999999%", "r=0", "r=-1"),
                *("9" * 5000, "r=" + "9" * 5000, "r=10**30", "", "%", "snan", "101%"),
            ]
        },
    ),
    "uniform_budget": Case(
        uniform_budget, lambda w: {"shapes": {"a": (2, 3)}, "rank": 1}, {"rank": COUNTS}
    ),
    "mix_covariances": Case(
        ck.mix_covariances,
        lambda w: {"sets": [w.covariances] * 2, "weights": [1, Fraction(1, 3)]},
        {
            "sets": [*OTHERS, [], [covariance()] * 2],
            "weights": [
                *(None, 5, "nan", [1], [0, 0], {}, [1, NAN], [1, INF], [-INF, INF], [1e308] * 2),
                *([1, -1], [1, "1"], [1, True], [1, None], [1, 1j], [1, [1]], [1, 10**400]),
            ],
            "normalize": [*CHOICES, None],
        },
    ),
    "drift_weights": Case(
        drift_weights,
        lambda w: {
            "model": w.model,
            "sets": [w.covariances] * 2,
            "held_out": [w.covariances] * 2,
            "steps": 1,
            "progress": False,
        },
        {
            "model": [*OTHERS, nn.Linear(2, 2)],
            "held_out": [*OTHERS, []],
            "rank": COUNTS,
            "steps": [*COUNTS, 10**30],
            "damping": DAMPINGS,
            "normalize": CHOICES,
        },
    ),
    "select_covariance": Case(
        ck.select_covariance,
        lambda w: {"model": w.model, "candidates": [w.covariances], "progress": False},
        {
            "model": [*OTHERS, nn.Linear(2, 2)],
            "candidates": [*OTHERS, [], [lambda: 5], "drift"],
            "selection": [*CHOICES, None],
            "damping": [*DAMPINGS, None],
            "condition": [*CHOICES, None],
        },
    ),
    "subspace_stability": Case(
        subspace_stability,
        lambda w: {
            "modules": w.modules,
            "first": w.covariances,
            "second": w.covariances,
            "rank": 2,
            "ends": ["largest"],
        },
        {
            "modules": [*OTHERS, {"nonsuch": nn.Linear(2, 2)}],
            "first": OTHERS,
            "second": [*OTHERS, covariance_set()],
            "rank": COUNTS,
            "damping": DAMPINGS,
            "ends": [["other"], [5], []],
        },
    ),
    "Stability.from_json": Case(
        stability_of,
        lambda w: {"entry": {"top": 0.5}},
        {
            "entry": [*OTHERS, *({"top": each} for each in ("0.5", NAN, INF, True, [1]))],
            "rank": COUNTS,
            "damping": DAMPINGS,
            "tokens": [5, [1], [1, -1], ["1", "2"], [1.5, 2]],
            "layers": OTHERS,
        },
    ),
    "Stability.verdict": Case(
        lambda layer: Stability(2, None, (1, 1), {}).verdict(layer),
        lambda w: {"layer": LayerStability(0.5)},
        {"layer": [*OTHERS, LayerStability()]},
    ),
    "Stability.at": Case(
        lambda end: Stability(2, None, (1, 1), {}).at(end, []),
        lambda w: {"end": "largest"},
        {"end": [*CHOICES, None]},
    ),
}
