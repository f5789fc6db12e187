"""An adapter as plain data: its factors, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, get_type_hints

from peft import LoraConfig
from torch import Tensor, nn

from corda_kernels import fields
from corda_kernels.adapter.base import BASE_FIELDS, base_difference, exact_targets
from corda_kernels.adapter.experts import file_name, peft_key, peft_layout
from corda_kernels.adapter.factors import MODES, AdapterFactors, LayerAdapter, lora_rows
from corda_kernels.errors import AdapterError
from corda_kernels.files import digest

FORMAT = "corda_kernels.adapter/4"
# What an adapter beside a residual fits is no model that could be loaded: this goes before the
# base's name in its configuration.
RESIDUAL_OF = "residual of "
# PEFT matches its patterns as regular expressions, and one in a file can be such that this takes
# for ever. Only those are read that are a name's end, escaped or not, anchored by ^ or led by `.*`.
NAME_PATTERN = re.compile(r"(\^|\.\*)?((?:\\\W|[^\\^$*+?{}\[\]()|])+)\$?")


def is_plain(name: Any) -> bool:
    """Whether PEFT, to which names are regular expressions, takes a text for the name it is."""
    found = NAME_PATTERN.fullmatch(name) if fields.is_text(name) else None
    return found is not None and found[2] == name and "\\" not in name


def is_saved(value: Any) -> bool:
    """Whether a value can be LoraConfig's `modules_to_save`, where PEFT names heads once more."""
    return isinstance(value, list) and all(map(is_plain, value))


# Of PEFT's LoraConfig, those that an adapter is made with; see `CordaConfig.lora`.
_LORA_FIELDS: dict[str, fields.Schema] = {
    "modules_to_save?": is_saved,
    "lora_dropout?": lambda value: fields.is_number(value, 0) and value < 1,
    "use_dora?": fields.is_flag,
}
_ALLOCATION_FIELDS: dict[str, fields.Schema] = {
    "budget": fields.is_whole,
    "spent": fields.is_whole,
    "condition": fields.is_text,
    "ranks": {"*": fields.is_whole},
}


def _schema(kind: type) -> dict[str, Any]:
    """What each field of a dataclass may be in a file, from its annotation."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


@dataclass(frozen=True)
class LayerNote:
    """What a record says of one layer, or of all experts of a parameter.

    Attributes:
        rank: number of components.
        tokens: that its covariance comes from; 0 where that is not known.
        sigma_max: the largest singular value taken.
        sigma_min: the smallest.
        residual: of the decomposition; 0 where it was exact.
    """

    rank: Annotated[int, fields.whole(1)]
    tokens: Annotated[int, fields.is_whole]
    sigma_max: Annotated[float, fields.number(0)]
    sigma_min: Annotated[float, fields.number(0)]
    residual: Annotated[float, fields.is_number]

    @classmethod
    def of(cls, values: Tensor, tokens: int = 0, residual: float | Tensor = 0) -> LayerNote:
        """Of the singular values (rank,) that a layer's adapter takes, descending."""
        return cls(len(values), tokens, float(values[0]), float(values[-1]), float(residual))


@dataclass
class AdapterRecord:
    """What `corda.json` keeps beside an adapter: how it was made and what it belongs to.

    Each field's annotation says what it may be in the file.

    Attributes:
        mode: "kpm", "ipm" or "task".
        rank: components of every layer; the largest where a budget was shared out.
        hold: scale of the LoRA's first factors, see `adapter_factors`; None with a residual.
        residual: None (a LoRA on the untouched base) or "weight" (W − B0 A0 stands in the base).
        damping: of the covariances, times their mean diagonal.
        base: of the base model, see `describe_base`.
        calibration: where the covariances come from.
        layers: by name.
        allocation: how a budget was shared out: `budget` and `spent` in adapter parameters,
            `condition`, and `ranks` by layer, 0 for layers without an adapter; {} without a budget.
        stability: how well the two halves of the calibration text agree, by layer.
        measured: what a report shows of the run that made it, see `init/measured.py`: `layers`
            (by name: shape and spectrum), `inputs` (channel statistics), `seconds` by stage and
            `peak_bytes` by device; {} where nothing was measured. Two runs that make the same
            adapter take different times: it does not count when records are compared.
        versions: of the libraries involved.
        lora: options that were passed on to PEFT's LoraConfig, such as lora_dropout.
        freeze_a: whether only B is to be trained.
        sides: "both" where the outputs' gradients weight the components too; see `product`.
        format: of this file.
    """

    mode: Annotated[str, fields.one_of(*MODES)]
    rank: Annotated[int, fields.whole(1)]
    hold: Annotated[float | None, fields.maybe(fields.is_positive)]
    residual: Annotated[str | None, fields.one_of(None, "weight")]
    damping: Annotated[float | None, fields.maybe(fields.number(0))]
    base: Annotated[dict[str, Any], BASE_FIELDS]
    calibration: Annotated[dict[str, Any], fields.is_object]
    layers: Annotated[dict[str, LayerNote], {"*": _schema(LayerNote)}]
    allocation: Annotated[dict[str, Any], fields.is_object] = field(default_factory=dict)
    stability: Annotated[dict[str, Any], fields.is_object] = field(default_factory=dict)
    measured: Annotated[dict[str, Any], fields.is_object] = field(
        default_factory=dict, compare=False
    )
    versions: Annotated[dict[str, str], fields.is_texts] = field(default_factory=dict)
    lora: Annotated[dict[str, Any], _LORA_FIELDS] = field(default_factory=dict)
    freeze_a: Annotated[bool, fields.is_flag] = False
    sides: Annotated[str, fields.one_of("inputs", "both")] = "inputs"
    format: Annotated[str, fields.is_text] = FORMAT

    @property
    def base_name(self) -> str:
        """The base model's name or path, for messages."""
        return self.base["source"] or "a model without a name"

    @property
    def rows(self) -> int:
        """Rows of the LoRA for each component."""
        return lora_rows(self.mode, self.residual)

    @property
    def product(self) -> str:
        """The matrix whose components the adapter is made of."""
        if self.mode == "task":
            return "Ḡ·C^-½"
        return "W·C" if self.sides == "inputs" else "D^½·W·C^½"

    @property
    def trains(self) -> str:
        """The components that the adapter is made of, in words."""
        if self.mode == "task":
            return "the steepest directions of the task's gradient"
        return f"the {MODES[self.mode].end} components of {self.product}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AdapterRecord:
        """Reads what `to_json` gave.

        Raises:
            AdapterError: a field is missing, unknown or of another kind, fields contradict each
                other, or the format is another one.
        """
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
        layers = {name: LayerNote(**note) for name, note in value["layers"].items()}
        return cls(**value | {"layers": layers})


def _check_record(value: dict[str, Any]) -> None:
    """Makes sure of all fields of a record.

    Raises:
        ValueError: it says which is wrong.
    """
    schema = _schema(AdapterRecord)
    schema["sides?"] = schema.pop("sides")  # earlier records have none
    fields.check_fields(value, schema, "the record")
    ranks = {name: entry["rank"] for name, entry in value["layers"].items()}
    if not ranks:
        raise ValueError("it has no layers")
    if (value["hold"] is None) != (value["residual"] is not None):
        raise ValueError("hold and residual exclude each other")
    if value["freeze_a"] and value["mode"] != "task":
        raise ValueError("freeze_a is of mode 'task'")
    parameters = value["base"].get("target_parameters", ())
    plain = {name for name in ranks if peft_key(name, parameters) not in parameters}
    if not _selects(value["base"]["target_modules"], plain):
        raise ValueError("target_modules are not the names of the layers")
    if len(parameters) != len(ranks) - len(plain):
        raise ValueError("target_parameters are not the names of parameters with an adapter")
    if value["allocation"]:
        fields.check_fields(value["allocation"], _ALLOCATION_FIELDS, "the allocation")
        allocated = value["allocation"]["ranks"]
        if {name: rank for name, rank in allocated.items() if rank != 0} != ranks:
            raise ValueError("the ranks of the allocation are not the layers' ranks")


def _selects(targets: list[str] | str, names: Collection[str]) -> bool:
    """Whether `target_modules` gives these targets for layers of these names in some model."""
    if isinstance(targets, str):
        return targets == exact_targets(names)
    found = [(name, end) for name in names for end in targets if f".{name}".endswith(f".{end}")]
    return {name for name, _ in found} == set(names) and {end for _, end in found} == set(targets)


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


def factor_key(name: str, factor: str) -> str:
    """PEFT's name for a layer's A or B in a file."""
    return f"base_model.model.{name}.lora_{factor}.weight"


def factor_tensors(layers: Mapping[str, AdapterFactors]) -> dict[str, Tensor]:
    """A and B of each layer by PEFT's names and in its layout."""
    return {
        factor_key(file_name(name, found, layers), factor): tensor
        for name, found in layers.items()
        for factor, tensor in zip("AB", peft_layout(found), strict=True)
    }


def initial_checksum(initial: Mapping[str, AdapterFactors]) -> str:
    """SHA-256 of the parts that an adapter has taken out of the weights."""
    scalings = {name: initial[name].scaling for name in sorted(initial)}
    return digest(factor_tensors(initial), repr(scalings))


def lora_config(adapter: Adapter) -> LoraConfig:
    """The LoraConfig of an adapter."""
    record = adapter.record
    parameters = record.base.get("target_parameters") or None
    prefix = "" if record.residual is None else RESIDUAL_OF
    return LoraConfig(
        bias="none",
        target_modules=record.base["target_modules"],
        target_parameters=parameters,
        **sizes(adapter.layers, parameters),
        fan_in_fan_out=record.base["fan_in_fan_out"],
        task_type=record.base["task_type"],
        base_model_name_or_path=f"{prefix}{record.base['source'] or ''}" or None,
        **record.lora,
    )


def sizes(layers: Mapping[str, AdapterFactors], parameters: Iterable[str] | None) -> dict[str, Any]:
    """Ranks and alphas of layers as LoraConfig has them.

    The rank is that of the widest linear layer. Those of fewer rows, and experts, stand in
    `rank_pattern`, those of another alpha in `alpha_pattern`, by their full names. Without a
    budget or experts there is neither.

    Args:
        layers: by name.
        parameters: PEFT's `target_parameters`.
    """
    found = {_pattern(peft_key(name, parameters), layers): each for name, each in layers.items()}
    ranks = {pattern: factors.rank for pattern, factors in found.items()}
    alphas = {pattern: _rounded(f.scaling * f.rank) for pattern, f in found.items()}
    linear = [pattern for pattern, factors in found.items() if factors.A.ndim == 2]
    widest = max(linear or ranks, key=ranks.__getitem__)
    return {
        "r": ranks[widest],
        "lora_alpha": alphas[widest],
        "rank_pattern": {name: own for name, own in ranks.items() if own != ranks[widest]},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alphas[widest]},
    }


def _rounded(alpha: float) -> float:
    """A whole number where it is one but for rounding: engines print it, and some parse it."""
    nearest = round(alpha)
    return nearest if nearest and abs(alpha - nearest) < 1e-9 * nearest else alpha


def _pattern(name: str, names: Iterable[str]) -> str:
    """What PEFT takes for this layer only: it compares the ends of names, as expressions."""
    if any(other.endswith(f".{name}") for other in names):
        return f"^{re.escape(name)}"
    return name if is_plain(name) else re.escape(name)


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
