"""Ranks under a budget by one sort against the filtering loop, one component at a time.

The error is the share of layers whose rank is not the loop's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Contest, Sized
from selection import literal_loop
from torch import Tensor

from corda_kernels.planning import allocate_ranks, uniform_budget

Ranks = dict[str, int]

BLOCKS, WIDTH, INNER, RANK = 30, 576, 1536, 32  # of SmolLM2-135M


@pytest.mark.parametrize("name", ["literal loop", "ours"])
def test_allocation(contest: Contest[Ranks], sized: Sized, name: str) -> None:
    width, inner = sized(WIDTH), sized(INNER)
    block = {"q": (width, width), "o": (width, width), "up": (inner, width), "down": (width, inner)}
    shapes = {f"{n}.{kind}": shape for n in range(BLOCKS) for kind, shape in block.items()}
    spectra: dict[str, Tensor] = {}
    for layer, shape in shapes.items():
        decades = float(1 + 4 * torch.rand(()))
        spectra[layer] = torch.logspace(0, -decades, min(shape), dtype=torch.float64)
    log_condition = {layer: float(5 + 10 * torch.rand(())) for layer in shapes}
    budget = uniform_budget(shapes, sized(RANK))
    as_lists = {layer: spectrum.tolist() for layer, spectrum in spectra.items()}
    costs = {layer: sum(shape) for layer, shape in shapes.items()}
    ways: dict[str, Callable[[], Ranks]] = {
        "literal loop": lambda: literal_loop(as_lists, log_condition, costs, budget),
        "ours": lambda: allocate_ranks(spectra, log_condition, shapes, budget=budget),
    }
    expected = ways["literal loop"]()
    contest(
        f"allocation over {len(shapes)} layers, budget of r = {sized(RANK)}",
        ways[name],
        lambda found: sum(found[layer] != expected[layer] for layer in shapes) / len(shapes),
    )
