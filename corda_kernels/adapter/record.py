"""An adapter as plain data: its factors, how it was made, and by what its base is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels import fields
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.lora import exact_targets, is_saved, target_modules
from corda_kernels.errors import AdapterError
from corda_kernels.files import digest
from corda_kernels.linears import is_quantised, linear_weight, weights_at_hand

FORMAT = "corda_kernels.adapter/4"

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
    "fan_in_fan_out": fields.is_flag,
    "task_type": fields.one_of(None, "CAUSAL_LM"),
}
_FIELDS: dict[str, fields.Schema] = {
    "mode": fields.one_of("kpm", "ipm"),
    "rank": fields.whole(1),
    "hold": fields.maybe(fields.is_positive),
    "residual": fields.one_of(None, "weight"),
    "damping": fields.maybe(fields.number(0)),
    "base": BASE_FIELDS,
    "layers": {
        "*": {
            "rank": fields.whole(1),
            "tokens": fields.is_whole,
            "sigma_max": fields.number(0),
            "sigma_min": fields.number(0),
            "residual": fields.is_number,
        }
    },
    # Of PEFT's LoraConfig, those that an adapter is made with; see `CordaConfig.lora`.
    "lora": {
        "modules_to_save?": is_saved,
        "lora_dropout?": lambda value: fields.is_number(value, 0) and value < 1,
        "use_dora?": fields.is_flag,
    },
    "versions": fields.is_texts,
    "format": fields.is_text,
    **dict.fromkeys(("calibration", "allocation", "stability", "measured"), fields.is_object),
}
_ALLOCATION_FIELDS: dict[str, fields.Schema] = {
    "budget": fields.is_whole,
    "spent": fields.is_whole,
    "condition": fields.is_text,
    "ranks": {"*": fields.is_whole},
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
        measured: what a report shows of the run that made it, see `init/measured.py`: `layers`
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
    fields.check_fields(value, _FIELDS, "the record")
    layers = value["layers"]
    if not layers:
        raise ValueError("it has no layers")
    if (value["hold"] is None) != (value["residual"] is not None):
        raise ValueError("hold and residual exclude each other")
    targets = value["base"]["target_modules"]
    if targets != exact_targets(layers) and (
        fields.is_text(targets)
        or not all(any(_ends(name, end) for end in targets) for name in layers)
        or not all(any(_ends(name, end) for name in layers) for end in targets)
    ):
        raise ValueError("target_modules are not the names of the layers")
    if value["allocation"]:
        fields.check_fields(value["allocation"], _ALLOCATION_FIELDS, "the allocation")
        ranks = value["allocation"]["ranks"]
        adapted = {name: entry["rank"] for name, entry in layers.items()}
        if {name: rank for name, rank in ranks.items() if rank != 0} != adapted:
            raise ValueError("the ranks of the allocation are not the layers' ranks")


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapters of all layers by module name, and their record."""

    layers: dict[str, LayerAdapter]
    record: AdapterRecord

    @property
    def initial(self) -> dict[str, AdapterFactors] | None:
        """What the adapter has taken out of each weight; None if it leaves the base untouched."""
        return initial_factors(self.layers)


def initial_factors(layers: Mapping[str, LayerAdapter]) -> dict[str, AdapterFactors] | None:
    """What layers have taken out of their weights; None if they leave the base untouched."""
    return {name: layer.initial for name, layer in layers.items() if layer.initial} or None


def initial_checksum(initial: dict[str, AdapterFactors]) -> str:
    """SHA-256 of the parts that an adapter has taken out of the weights."""
    tensors: dict[str, Tensor] = {}
    for name, factors in initial.items():
        tensors |= {f"{name}.A": factors.A, f"{name}.B": factors.B}
    return digest(tensors, repr({name: initial[name].scaling for name in sorted(initial)}))


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
