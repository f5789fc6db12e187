"""What an initialisation does about fused experts: checks, ranks, and one adapter of many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from corda_kernels.adapter.experts import oriented
from corda_kernels.adapter.factors import LayerAdapter
from corda_kernels.adapter.record import LayerNote
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.calibration.expert_layers import expert_names
from corda_kernels.errors import AdapterError, ConfigError
from corda_kernels.experts import ExpertParameter
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.layers import MadeLayer
from corda_kernels.init.measured import measured_input
from corda_kernels.linears import linear_shape
from corda_kernels.planning.ranks import Shape
from corda_kernels.planning.scores import LayerSpectrum
from corda_kernels.structure import text_config

# What configurations call the number of experts that a token is sent to.
_ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "topk")

# How the fields of the experts' notes are joined to that of their parameter; all have one rank.
_JOINED = {"rank": max, "tokens": max, "sigma_max": max, "sigma_min": min, "residual": max}


def check_experts(
    parameters: Mapping[str, ExpertParameter], config: CordaConfig, *, use_peft: bool
) -> None:
    """Makes sure that adapters of expert parameters, by name, are possible.

    Raises:
        ConfigError: PEFT is not used, or an option does not go with experts.
        AdapterError: weights are offloaded.
    """
    reason = ""
    if not use_peft:
        reason = "CordaLinear cannot adapt fused experts: use PEFT"
    elif config.freeze_a or config.residual or config.use_dora or config.lora_dropout:
        reason = (
            'freeze_a, residual="weight", lora_dropout and use_dora are not possible for fused '
            "experts: leave them out"
        )
    for name, parameter in parameters.items():
        remedy = f"leave {name} and the like out by exclude_modules, or experts at None"
        if reason:
            raise ConfigError(f"{reason}, or {remedy}")
        if getattr(parameter.module, parameter.attribute).is_meta:
            raise AdapterError(
                f"the experts' parameter {name} is offloaded: load the model where it fits, or "
                f"{remedy}"
            )


def active_experts(model: nn.Module) -> int:
    """How many routed experts a token is sent to; 1 where the model's configuration is silent."""
    config = text_config(model)
    known = {} if config is None else vars(config)
    return next((int(known[name]) for name in _ACTIVE if known.get(name)), 1)


def layer_shapes(
    modules: Mapping[str, nn.Module], parameters: Mapping[str, ExpertParameter]
) -> dict[str, Shape]:
    """(out, in) of linear layers and (experts, out, in) of expert parameters."""
    return {name: linear_shape(module, name) for name, module in modules.items()} | {
        name: (parameter.experts, parameter.outputs, parameter.inputs)
        for name, parameter in parameters.items()
    }


def for_each(
    parameters: Mapping[str, ExpertParameter], of_layers: Mapping[str, int]
) -> dict[str, int]:
    """What belongs to layers, with what belongs to a parameter given to each of its experts."""
    return {
        each: value
        for name, value in of_layers.items()
        for each in (expert_names(name, parameters[name]) if name in parameters else [name])
    }


def united_spectra(
    parameters: Mapping[str, ExpertParameter], spectra: Mapping[str, LayerSpectrum]
) -> dict[str, LayerSpectrum]:
    """Spectra of layers, with one of each parameter in place of those of its experts: the mean of
    singular values and log conditions, for one component is granted to all of them."""
    found = dict(spectra)
    for name, parameter in parameters.items():
        parts = [found.pop(each) for each in expert_names(name, parameter) if each in found]
        if parts:
            values = torch.stack([part.singular_values for part in parts])
            condition = sum(part.log_condition for part in parts) / len(parts)
            found[name] = LayerSpectrum(values.mean(0), condition)
    return found


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
    adapter = LayerAdapter(
        torch.stack([part.adapter.A for part in parts]),
        torch.stack([part.adapter.B for part in parts]),
        parts[0].adapter.scaling,
    )
    notes = {field: [getattr(part.note, field) for part in parts] for field in vars(parts[0].note)}
    note = LayerNote(**{field: _JOINED[field](values) for field, values in notes.items()})
    return MadeLayer(oriented(parameter, adapter), note, {})


def _united_note(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all experts, with the mean of their spectra."""
    note = notes[0] | {"shape": [len(notes), *notes[0]["shape"]]}
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
