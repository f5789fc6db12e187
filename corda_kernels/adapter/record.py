"""The record of an adapter: how it was made, and by what its base is recognised."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from corda_kernels.adapter.lora_files import is_saved
from corda_kernels.errors import AdapterError
from corda_kernels.fields import (
    Check,
    check_fields,
    is_names,
    is_number,
    is_object,
    is_positive,
    is_text,
    is_texts,
    is_whole,
)
from corda_kernels.linears import is_quantised, linear_weight, weights_at_hand

FORMAT = "corda_kernels.adapter/4"

# Numbers sampled from the base's weights to recognise it by. A base loaded in another dtype differs
# by rounding, 0.2 % RMS at most (bfloat16); fine-tuning of all weights moves them by more.
_SAMPLES = 64
_SAME_BASE = 5e-3
# Four bits move Gaussian weights by a tenth, and a base's relatives are no further from it; the
# weights of a model that has nothing to do with it are (1.4).
_SAME_BUT_QUANTISED = 0.15

# What the fields of corda.json may hold.
_RECORD_FIELDS: dict[str, Check] = {
    "mode": lambda value: value in ("kpm", "ipm"),
    "rank": lambda value: is_whole(value, 1),
    "hold": lambda value: value is None or is_positive(value),
    "residual": lambda value: value in (None, "weight"),
    "damping": lambda value: value is None or is_number(value, 0),
    "base": is_object,
    "calibration": is_object,
    "layers": lambda value: is_object(value) and len(value) > 0,
    "allocation": is_object,
    "stability": is_object,
    "measured": is_object,
    "versions": is_texts,
    "lora": is_object,
    "format": is_text,
}
_BASE_FIELDS: dict[str, Check] = {
    "source": lambda value: value is None or is_text(value),
    "sample": lambda value: (
        isinstance(value, list) and len(value) == _SAMPLES and all(map(is_number, value))
    ),
    "quantised": lambda value: isinstance(value, bool),
    "target_modules": lambda value: is_text(value) or is_names(value),
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "task_type": lambda value: value in (None, "CAUSAL_LM"),
}
_ALLOCATION_FIELDS: dict[str, Check] = {
    "budget": is_whole,
    "spent": is_whole,
    "condition": is_text,
    "ranks": lambda value: is_object(value) and all(map(is_whole, value.values())),
}
_LAYER_FIELDS: dict[str, Check] = {
    "rank": lambda value: is_whole(value, 1),
    "tokens": is_whole,
    "sigma_max": lambda value: is_number(value, 0),
    "sigma_min": lambda value: is_number(value, 0),
    "residual": is_number,
}
# Of PEFT's LoraConfig, those that an adapter is made with; see `CordaConfig.lora`.
_LORA_FIELDS: dict[str, Check] = {
    "modules_to_save": is_saved,
    "lora_dropout": lambda value: is_number(value, 0) and value < 1,
    "use_dora": lambda value: isinstance(value, bool),
}


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
            AdapterError: a field is missing, unknown or of another kind, fields contradict each
                other, or the format is another one.
        """
        if not isinstance(value, dict):
            raise AdapterError("corda.json was altered: it holds no object")
        if value.get("format") != FORMAT:
            raise AdapterError(
                f"corda.json has format {value.get('format')!r}, this version reads {FORMAT!r}: "
                "update corda_kernels, or make the adapter again"
            )
        try:
            _check_record(value)
        except ValueError as error:
            raise AdapterError(
                f"corda.json was altered: {error}; copy it from the folder of the fresh adapter"
            ) from error
        return cls(**value)


def _check_record(value: Any) -> None:
    """Makes sure of all fields of a record.

    Raises:
        ValueError: it says which is wrong.
    """
    check_fields(value, _RECORD_FIELDS, "the record")
    check_base_fields(value["base"])
    check_fields(value["lora"], _LORA_FIELDS, "lora", may_lack=_LORA_FIELDS)
    layers = value["layers"]
    for name, entry in layers.items():
        check_fields(entry, _LAYER_FIELDS, name)
    if (value["hold"] is None) != (value["residual"] is not None):
        raise ValueError("hold and residual exclude each other")
    targets = value["base"]["target_modules"]
    if not (
        targets == exact_targets(layers) if is_text(targets) else _selects_only(targets, layers)
    ):
        raise ValueError("target_modules are not the names of the layers")
    if value["allocation"]:
        check_fields(value["allocation"], _ALLOCATION_FIELDS, "the allocation")
        ranks = value["allocation"]["ranks"]
        adapted = {name: entry["rank"] for name, entry in layers.items()}
        if {name: rank for name, rank in ranks.items() if rank != 0} != adapted:
            raise ValueError("the ranks of the allocation are not the layers' ranks")


def check_base_fields(value: Any) -> None:
    """Makes sure of what a file says of a base; see `describe_base`.

    Raises:
        ValueError: it says what is wrong.
    """
    check_fields(value, _BASE_FIELDS, "base", may_lack=("quantised",))


def exact_targets(names: Collection[str]) -> str:
    """The regular expression that selects modules of these full names, and no others."""
    return "|".join(map(re.escape, sorted(names)))


def _selects_only(endings: Collection[str], names: Collection[str]) -> bool:
    """Whether each name has one of the endings, and each ending is one of some name."""
    used = {
        ending
        for name in names
        for ending in endings
        if name == ending or name.endswith(f".{ending}")
    }
    return used == set(endings) and all(
        any(name == ending or name.endswith(f".{ending}") for ending in used) for name in names
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
    causal = hasattr(model, "prepare_inputs_for_generation")
    return {
        "source": str(getattr(model, "name_or_path", "")) or None,
        "sample": _sample(modules),
        "quantised": any(map(is_quantised, modules.values())),
        "target_modules": target_modules(model, modules),
        "fan_in_fan_out": not all(isinstance(module, nn.Linear) for module in modules.values()),
        "task_type": "CAUSAL_LM" if causal else None,
    }


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
