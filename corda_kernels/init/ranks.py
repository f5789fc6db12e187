"""The rank of every layer: the same for all, or a budget shared out by the layers' spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import RankError
from corda_kernels.init.config import CordaConfig
from corda_kernels.linears import is_linear, is_quantised, linear_shape
from corda_kernels.planning import allocate_ranks, layer_spectra, parse_budget, uniform_budget
from corda_kernels.planning.scores import SCORING_DAMPING, LayerSpectrum
from corda_kernels.usage import Stopwatch


@dataclass(frozen=True)
class PlannedRanks:
    """How many components each layer gets.

    Attributes:
        ranks: by layer.
        allocation: how a budget was shared out, as JSON; empty without one.
        spectra: of all layers, by which it was.
    """

    ranks: dict[str, int]
    allocation: dict[str, Any] = field(default_factory=dict)
    spectra: dict[str, LayerSpectrum] = field(default_factory=dict)


def planned_ranks(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    covariances: CovarianceSet,
    config: CordaConfig,
    clock: Stopwatch,
) -> PlannedRanks:
    """The rank of each layer: the same for all, or by the spectra under a budget.

    Raises:
        RankError: the budget does not pay for a single component.
    """
    if config.budget is None:
        return PlannedRanks(dict.fromkeys(modules, config.rank))
    shapes = layer_shapes(modules)
    budget = adapter_parameters(model, modules, config)
    with clock.stage("allocation"):
        spectra = layer_spectra(
            modules,
            covariances,
            damping=config.damping or SCORING_DAMPING,
            condition=config.condition,
            distributed=config.distributed,
            progress=config.progress,
        )
        ranks = allocate_ranks(
            {name: spectrum.singular_values for name, spectrum in spectra.items()},
            {name: spectrum.log_condition for name, spectrum in spectra.items()},
            shapes,
            budget=budget,
            mode=config.mode,
            min_rank=config.min_rank,
            max_rank=config.max_rank,
            rank_multiple=config.rank_multiple,
            rows=config.rows,
        )
    spent = config.rows * sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    if not spent:
        raise RankError(
            f"a budget of {budget} adapter parameters does not pay for one component of the layer "
            "that is first in line: raise the budget, or write it as the rank it would hold in all "
            "layers (r=8)"
        )
    allocation = {
        "budget": budget,
        "spent": spent,
        "condition": config.condition,
        "ranks": ranks,
    }
    return PlannedRanks(ranks, allocation, spectra)


def adapter_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], config: CordaConfig
) -> int:
    """How many parameters an adapter of `modules` may have at most.

    Raises:
        ConfigError: the budget cannot be read.
    """
    if config.budget is None:
        return uniform_budget(layer_shapes(modules), config.rank, config.rows)
    whole = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if is_linear(module) and is_quantised(module):  # of four bits two weights are one number
            whole += math.prod(linear_shape(module)) - module.weight.numel()  # type: ignore[operator]
    return parse_budget(config.budget, layer_shapes(modules), whole, config.rows)


def layer_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """(out, in) of each layer."""
    shapes = {}
    for name, module in modules.items():
        outputs, inputs = linear_shape(module)
        shapes[name] = outputs, inputs
    return shapes
