"""The base of an adapter: what is noted of it, and how it is recognised later."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft import TaskType
from torch import nn

from corda_kernels import fields
from corda_kernels.adapter.experts import rewritten_layers
from corda_kernels.calibration.expert_layers import expert_layer
from corda_kernels.experts import ExpertParameter
from corda_kernels.linears import is_quantised, linear_weight, weights_at_hand, whole_layer
from corda_kernels.structure import task_type

# Numbers sampled from the base's weights to recognise it by. A base loaded in another dtype differs
# by rounding, 0.2 % RMS at most (bfloat16); fine-tuning of all weights moves them by more.
_SAMPLES = 64
_SAME_BASE = 5e-3
# Four bits move Gaussian weights by a tenth, and a base's relatives are no further from it; the
# weights of a model that has nothing to do with it are (1.4).
_SAME_BUT_QUANTISED = 0.15
# What a file says of a base, see `describe_base`.
BASE_FIELDS: dict[str, fields.Schema] = {
    "source": fields.maybe(fields.is_text),
    "sample": lambda value: (
        isinstance(value, list) and len(value) == _SAMPLES and all(map(fields.is_number, value))
    ),
    "quantised?": fields.is_flag,
    "target_modules": lambda value: fields.is_text(value) or fields.is_names(value),
    "target_parameters?": fields.is_names,
    "fan_in_fan_out": fields.is_flag,
    "task_type": fields.one_of(None, *TaskType),
}


def exact_targets(names: Iterable[str]) -> str:
    """The regular expression that selects modules of these full names, and no others."""
    return "|".join(map(re.escape, sorted(names)))


def target_modules(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """What PEFT's LoraConfig has to select to find modules of these full names, and no others.

    Short names, as PEFT and serving engines like them, if they select just the same; a regular
    expression only where full names would select more.
    """
    endings = {name.rpartition(".")[2] for name in names}
    # PEFT goes by the ends of names alone: what is no linear layer would be adapted, or refused.
    others = {name for name, _ in model.named_modules()}.difference(names)
    if not any(name.rpartition(".")[2] in endings for name in others):
        return sorted(endings)
    if not any(other.endswith(f".{name}") for other in others for name in names):
        return sorted(names)
    return exact_targets(names)


def describe_base(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    experts: Mapping[str, ExpertParameter] | None = None,
) -> dict[str, Any]:
    """What an adapter needs to know of its base later, when only its folder is at hand.

    Args:
        model: the base.
        modules: its linear layers that are adapted, by name.
        experts: its expert parameters that are adapted, by name.

    Returns:
        JSON-like: `source` (name or path, None if the model has none), `sample` (see
        `check_base`), whether any layer is `quantised`, and what PEFT's LoraConfig asks for:
        `target_modules`, `target_parameters` where there are any, `fan_in_fan_out`, `task_type`.
    """
    experts = experts or {}
    rewritten = rewritten_layers(model, modules)
    parameters = sorted([*experts, *(f"{name}.weight" for name in rewritten)])
    return {
        "source": str(getattr(model, "name_or_path", "")) or None,
        "sample": _sample(sampled(modules, experts)),
        "quantised": any(map(is_quantised, modules.values())),
        "target_modules": target_modules(model, modules.keys() - rewritten),
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": not all(isinstance(module, nn.Linear) for module in modules.values()),
        "task_type": task_type(model),
    }


def sampled(
    modules: Mapping[str, nn.Module], experts: Mapping[str, ExpertParameter]
) -> dict[str, nn.Module]:
    """The layers that a base is recognised by: of experts the first."""
    first = {name: expert_layer(parameter, 0) for name, parameter in experts.items()}
    return {**modules, **first}


def _sample(modules: Mapping[str, nn.Module]) -> list[float]:
    """Weights at fixed places, spread over all layers, by which the base is recognised later."""
    names = sorted(modules)
    values = []
    for index in range(_SAMPLES):
        module = modules[names[index * len(names) // _SAMPLES]]
        with weights_at_hand(module):
            weight = linear_weight(whole_layer(module)).detach()
            place = (2654435761 * (index + 1)) % weight.numel()
            row, column = divmod(place, weight.shape[1])
            values.append(round(float(weight[row, column]), 8))
    return values


def base_difference(base: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> float:
    """How far the layers' weights are from those that `describe_base` saw, relative RMS.

    It is 0 where they differ by no more than another dtype of the same base does, or quantising it
    if either is quantised.
    """
    expected = torch.tensor(base["sample"], dtype=torch.float64)
    found = torch.tensor(_sample(modules), dtype=torch.float64)
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    quantised = base.get("quantised", False) or any(map(is_quantised, modules.values()))
    # NaN is not the same.
    return 0.0 if difference <= (_SAME_BUT_QUANTISED if quantised else _SAME_BASE) else difference
