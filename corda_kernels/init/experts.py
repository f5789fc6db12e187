"""What an initialisation does about fused experts: checks, ranks, and one adapter of many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import peft
import torch
from packaging.version import Version
from torch import nn

from corda_kernels.adapter import AdapterFactors, LayerAdapter, oriented
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.calibration.expert_layers import expert_names
from corda_kernels.errors import AdapterError, ConfigError, RankError, TargetError
from corda_kernels.experts import ExpertParameter, expert_parameters
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.layers import MadeLayer
from corda_kernels.init.measured import measured_input

_PEFT = Version("0.20")
# What configurations call the number of experts that a token is sent to.
_ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "topk")


def check_experts(
    model: nn.Module, config: CordaConfig, *, use_peft: bool = True
) -> dict[str, ExpertParameter]:
    """The expert parameters that `config` selects, by name: all of them or none.

    Raises:
        TargetError: the model has none.
        ConfigError: PEFT is not used, or too old.
        RankError: the rank is not possible for an expert.
        AdapterError: weights are offloaded.
    """
    if config.experts is None:
        return {}
    parameters = expert_parameters(model)
    if not parameters:
        raise TargetError(
            f"experts={config.experts!r} is about fused experts, which the model does not have: "
            "leave experts at None"
        )
    if not use_peft:
        raise ConfigError("CordaLinear cannot adapt fused experts: experts needs use_peft=True")
    if Version(peft.__version__) < _PEFT:
        raise ConfigError(
            f"PEFT {peft.__version__} turns some experts' adapters the wrong way round, or keeps "
            f"one adapter of them only: experts needs PEFT {_PEFT} or newer"
        )
    ranks = dict.fromkeys(parameters, max(config.min_rank, 1))
    if config.budget is None:
        ranks = parameter_ranks(model, parameters, config.rank)
    for name, parameter in parameters.items():
        if getattr(parameter.module, parameter.attribute).is_meta:
            raise AdapterError(
                f"the experts' parameter {name} is offloaded: load the model where it fits, or "
                "leave experts at None"
            )
        most = min(parameter.outputs, parameter.inputs)
        if ranks[name] > most:
            raise RankError(
                f"rank {ranks[name]} is not possible for the experts of {name} "
                f"({parameter.outputs} × {parameter.inputs}): choose a smaller rank"
            )
    return parameters


def active_experts(model: nn.Module) -> int:
    """How many routed experts a token is sent to; 1 where the model's configuration is silent."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return next((int(config.__dict__[name]) for name in _ACTIVE if config.__dict__.get(name)), 1)


def parameter_ranks(
    model: nn.Module, parameters: Mapping[str, ExpertParameter], rank: int
) -> dict[str, int]:
    """Components of each expert, so that a token's experts have `rank` together."""
    return dict.fromkeys(parameters, max(1, rank // active_experts(model)) if parameters else 0)


def expert_ranks(
    model: nn.Module, parameters: Mapping[str, ExpertParameter], rank: int
) -> dict[str, int]:
    """The same by the names of single experts."""
    ranks = parameter_ranks(model, parameters, rank)
    return {
        each: ranks[name] for name in parameters for each in expert_names(name, parameters[name])
    }


def united_experts(
    parameters: Mapping[str, ExpertParameter],
    made: Mapping[str, MadeLayer],
    notes: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, MadeLayer], dict[str, dict[str, Any]]]:
    """Adapters and notes of layers, with one of each parameter in place of those of its experts."""
    layers, measured = dict(made), dict(notes)
    for name, parameter in parameters.items():
        names = expert_names(name, parameter)
        seen = [measured.pop(each) for each in names if each in measured]
        if seen:
            measured[name] = _united_note(seen)
        parts = [layers.pop(each) for each in names if each in layers]
        if parts:
            layers[name] = _united(parameter, parts)
    return layers, measured


def _united(parameter: ExpertParameter, parts: list[MadeLayer]) -> MadeLayer:
    """One layer of all experts."""
    factors = AdapterFactors(
        torch.stack([part.adapter.A for part in parts]),
        torch.stack([part.adapter.B for part in parts]),
        parts[0].adapter.scaling,
    )
    notes = [part.note for part in parts]
    note = {
        "rank": notes[0]["rank"],
        "tokens": max(each["tokens"] for each in notes),
        "sigma_max": max(each["sigma_max"] for each in notes),
        "sigma_min": min(each["sigma_min"] for each in notes),
        "residual": max(each["residual"] for each in notes),
    }
    return MadeLayer(LayerAdapter(oriented(parameter, factors)), note, {})


def _united_note(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all experts, with the mean of their spectra."""
    note = notes[0] | {"experts": len(notes)}
    if note["spectrum"]:
        columns = zip(*(each["spectrum"]["value"] for each in notes), strict=True)
        mean = [float(f"{sum(column) / len(notes):.4g}") for column in columns]
        note["spectrum"] = note["spectrum"] | {"value": mean}
    if "condition" in note:
        note["condition"] = max(each["condition"] for each in notes)
    return note


def united_inputs(
    covariances: CovarianceSet, parameters: Mapping[str, ExpertParameter]
) -> list[dict[str, Any]]:
    """What `measured_input` gives of each distinct input, of experts' own inputs of all of them."""
    own = {
        each: name
        for name, parameter in parameters.items()
        for each in expert_names(name, parameter)
    }
    pooled: dict[str, list[Covariance]] = {}
    notes = []
    for part, names in covariances.groups():
        if names[0] in own:
            pooled.setdefault(own[names[0]], []).append(part)
        else:
            notes.append(measured_input(part, names))
    for name, parts in pooled.items():
        whole = replace(
            parts[0],
            tokens=sum(part.tokens for part in parts),
            absmax=torch.stack([part.absmax for part in parts]).amax(0),
            outlier_count=torch.stack([part.outlier_count for part in parts]).sum(0),
        )
        notes.append(measured_input(whole, [name]))
    return notes
