"""The record of an adapter: how it was made, and by what its base is recognised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import nn

from corda_kernels.errors import AdapterError
from corda_kernels.linears import is_quantised, linear_weight, weights_at_hand

FORMAT = "corda_kernels.adapter/4"

# What the fields of corda.json may hold.
_RECORD_FIELDS: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "rank": (int,),
    "hold": (float, int, NoneType),
    "residual": (str, NoneType),
    "damping": (float, int, NoneType),
    "base": (dict,),
    "calibration": (dict,),
    "layers": (dict,),
    "allocation": (dict,),
    "stability": (dict,),
    "measured": (dict,),
    "versions": (dict,),
    "lora": (dict,),
    "format": (str,),
}
_BASE_FIELDS: dict[str, tuple[type, ...]] = {
    "source": (str, NoneType),
    "sample": (list,),
    "target_modules": (list, str),
    "fan_in_fan_out": (bool,),
    "task_type": (str, NoneType),
}
_ALLOCATION_FIELDS: dict[str, tuple[type, ...]] = {
    "budget": (int,),
    "spent": (int,),
    "condition": (str,),
    "ranks": (dict,),
}
_LAYER_FIELDS: dict[str, tuple[type, ...]] = {
    "rank": (int,),
    "tokens": (int,),
    "sigma_max": (float, int),
    "sigma_min": (float, int),
    "residual": (float, int),
}

# Numbers sampled from the base's weights to recognise it by. A base loaded in another dtype differs
# by rounding, 0.2 % RMS at most (bfloat16); fine-tuning of all weights moves them by more.
_SAMPLES = 64
_SAME_BASE = 5e-3
# Four bits move Gaussian weights by a tenth, and a base's relatives are no further from it; the
# weights of a model that has nothing to do with it are (1.4).
_SAME_BUT_QUANTISED = 0.15


@dataclass
class AdapterRecord:
    """What `corda.json` keeps beside an adapter: how it was made and what it belongs to.

    Attributes:
        mode: "kpm" or "ipm".
        rank: components of every layer; the largest where a budget was shared out.
        hold: scale of the LoRA's first factors, see `adapter_factors`; None with a residual.
        residual: None (a LoRA on the untouched base) or "weight" (W − B0 A0 stands in the base).
        damping: of the covariances, times their mean diagonal.
        base: of the base model, see `describe_base`.
        calibration: where the covariances come from.
        layers: by name: rank, largest and smallest singular value kept, tokens.
        allocation: how a budget was shared out: `budget` and `spent` in adapter parameters,
            `condition`, and `ranks` by layer, 0 for layers without an adapter; {} without a budget.
        stability: how well the two halves of the calibration text agree, by layer.
        measured: what a report shows of the run that made it, see `pipeline/measured.py`: `layers`
            (by name: shape and spectrum), `inputs` (channel statistics), `seconds` by stage and
            `peak_bytes` by device; {} where nothing was measured. Two runs that make the same
            adapter take different times: it does not count when records are compared.
        versions: of the libraries involved.
        lora: options that were passed on to PEFT's LoraConfig, such as lora_dropout.
        format: of this file.
    """

    mode: str
    rank: int
    hold: float | None
    residual: str | None
    damping: float | None
    base: dict[str, Any]
    calibration: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    allocation: dict[str, Any] = field(default_factory=dict)
    stability: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict, compare=False)
    versions: dict[str, str] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT

    @property
    def base_name(self) -> str:
        """The base model's name or path, for messages."""
        return self.base["source"] or "a model without a name"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> AdapterRecord:
        """Reads what `to_json` gave.

        Raises:
            AdapterError: fields are missing, or the format is another one.
        """
        if not isinstance(value, dict):
            raise AdapterError("corda.json was altered: it holds no object")
        if value.get("format") != FORMAT:
            raise AdapterError(
                f"corda.json has format {value.get('format')!r}, this version reads {FORMAT!r}: "
                "update corda_kernels, or make the adapter again"
            )
        odd = sorted(_RECORD_FIELDS.keys() ^ value.keys())
        if odd:
            raise AdapterError(f"corda.json was altered: field {odd[0]!r} is missing or unknown")
        _check_fields("the record", value, _RECORD_FIELDS)
        for name, allowed in (("mode", ("kpm", "ipm")), ("residual", (None, "weight"))):
            if value[name] not in allowed:
                raise AdapterError(f"corda.json was altered: {name} is {value[name]!r}")
        _check_fields("base", value["base"], _BASE_FIELDS)
        for name, entry in value["layers"].items():
            _check_fields(name, entry, _LAYER_FIELDS)
        if value["allocation"]:
            _check_fields("the allocation", value["allocation"], _ALLOCATION_FIELDS)
            ranks = value["allocation"]["ranks"]
            adapted = {name: entry["rank"] for name, entry in value["layers"].items()}
            if {name: rank for name, rank in ranks.items() if rank != 0} != adapted:
                raise AdapterError(
                    "corda.json was altered: the ranks of the allocation are not the layers' ranks"
                )
        sample, targets = value["base"]["sample"], value["base"]["target_modules"]
        if len(sample) != _SAMPLES or not all(isinstance(entry, float | int) for entry in sample):
            raise AdapterError("corda.json was altered: the base's sample is not made of numbers")
        if not all(isinstance(entry, str) for entry in targets):
            raise AdapterError("corda.json was altered: target_modules are not names")
        return cls(**value)


def _check_fields(where: str, entry: Any, allowed: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(entry, dict):
        raise AdapterError(f"corda.json was altered: {where} is no object")
    missing = allowed.keys() - entry.keys()
    if missing:
        raise AdapterError(f"corda.json was altered: {where} lacks {min(missing)!r}")
    for name, types in allowed.items():
        if not isinstance(entry[name], types):
            raise AdapterError(
                f"corda.json was altered: {name!r} of {where} cannot be {str(entry[name])[:40]!r}"
            )


def describe_base(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What an adapter needs to know of its base later, when only its folder is at hand.

    Args:
        model: the base.
        modules: its layers that are adapted, by name.

    Returns:
        JSON-like: `source` (name or path, None if the model has none), `sample` (see
        `check_base`), whether any layer is `quantised`, and what PEFT's LoraConfig asks for:
        `target_modules`, `fan_in_fan_out`, `task_type`.
    """
    endings = {name.rpartition(".")[2] for name in modules}
    # PEFT goes by the ends of names alone: what is no linear layer would be adapted, or refused.
    others = {name for name, _ in model.named_modules()} - modules.keys()
    if not any(name.rpartition(".")[2] in endings for name in others):
        targets: list[str] | str = sorted(endings)
    elif not any(other.endswith(f".{name}") for other in others for name in modules):
        targets = sorted(modules)
    else:
        targets = "|".join(map(re.escape, sorted(modules)))
    causal = hasattr(model, "prepare_inputs_for_generation")
    return {
        "source": str(getattr(model, "name_or_path", "")) or None,
        "sample": _sample(modules),
        "quantised": any(map(is_quantised, modules.values())),
        # Short names, as PEFT and serving engines like them, if they select just the same; a
        # regular expression only where full names would select more.
        "target_modules": targets,
        "fan_in_fan_out": not all(isinstance(module, nn.Linear) for module in modules.values()),
        "task_type": "CAUSAL_LM" if causal else None,
    }


def _sample(modules: Mapping[str, nn.Module]) -> list[float]:
    """Weights at fixed places, spread over all layers, by which the base is recognised later."""
    names = sorted(modules)
    values = []
    for index in range(_SAMPLES):
        module = modules[names[index * len(names) // _SAMPLES]]
        with weights_at_hand(module):
            weight = linear_weight(module).detach()
            place = (2654435761 * (index + 1)) % weight.numel()
            row, column = divmod(place, weight.shape[1])
            values.append(round(float(weight[row, column]), 8))
    return values


def check_base(record: AdapterRecord, modules: Mapping[str, nn.Module]) -> None:
    """Makes sure that the adapter belongs to the model whose target layers are given.

    Raises:
        AdapterError: it does not.
    """
    difference = base_difference(record.base, modules)
    if difference:
        raise AdapterError(
            f"the adapter was made for {record.base_name}, but this model's weights differ "
            f"from that one's by {difference:.1%}: load the base that the adapter was made for"
        )


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
