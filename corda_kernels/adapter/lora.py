"""A LoRA as PEFT lays it out: the names of its layers, its configuration and its tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from corda_kernels import fields
from corda_kernels.adapter.factors import AdapterFactors
from corda_kernels.errors import AdapterError
from corda_kernels.files import write_bytes, write_tensors

if TYPE_CHECKING:
    from corda_kernels.adapter.record import Adapter

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# PEFT's name for a model's first adapter, whose files stand in the folder itself.
TRAINED = "default"

# What an adapter beside a residual fits is no model that could be loaded: this goes before the
# base's name in its configuration.
_RESIDUAL_OF = "residual of "
_NAME = "base_model_name_or_path"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXED = "its files belong to different adapters, or were altered"

# PEFT matches its patterns as regular expressions, and one in a file can be such that this takes
# for ever. Only those are read that are a name's end, escaped or not, anchored by ^ or led by `.*`.
_PATTERN = re.compile(r"(\^|\.\*)?((?:\\\W|[^\\^$*+?{}\[\]()|])+)\$?")


def factor_key(name: str, factor: str) -> str:
    """PEFT's name for a layer's A or B in a file."""
    return f"base_model.model.{name}.lora_{factor}.weight"


def layer_of(key: str) -> str:
    """The layer that a tensor in PEFT's file belongs to."""
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


def factor_tensors(layers: Mapping[str, AdapterFactors]) -> dict[str, Tensor]:
    """A and B of each layer by PEFT's names."""
    return {
        factor_key(name, factor): getattr(found, factor).contiguous()
        for name, found in layers.items()
        for factor in "AB"
    }


def is_plain(name: Any) -> bool:
    """Whether PEFT, to which names are regular expressions, takes a text for the name it is."""
    found = _PATTERN.fullmatch(name) if fields.is_text(name) else None
    return found is not None and found[2] == name and "\\" not in name


def is_saved(value: Any) -> bool:
    """Whether a value can be LoraConfig's `modules_to_save`."""
    return fields.is_names(value) and all(map(is_plain, value))


def exact_targets(names: Collection[str]) -> str:
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


def lora_config(adapter: Adapter) -> LoraConfig:
    """The LoraConfig of an adapter.

    Layers of fewer rows than the largest stand in `rank_pattern`, those of another alpha in
    `alpha_pattern`, by their full names. Without a budget there is neither.
    """
    record = adapter.record
    names = {name: _pattern(name, adapter.layers) for name in adapter.layers}
    ranks = {name: layer.trained.rank for name, layer in adapter.layers.items()}
    rank = max(ranks.values())
    alphas = {name: rounded(layer.scaling * ranks[name]) for name, layer in adapter.layers.items()}
    alpha = next(alphas[name] for name in alphas if ranks[name] == rank)
    source = record.base["source"]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        bias="none",
        target_modules=record.base["target_modules"],
        rank_pattern={names[name]: own for name, own in ranks.items() if own != rank},
        alpha_pattern={names[name]: own for name, own in alphas.items() if own != alpha},
        fan_in_fan_out=record.base["fan_in_fan_out"],
        task_type=record.base["task_type"],
        base_model_name_or_path=source if record.residual is None else residual_name(source),
        **record.lora,
    )


def rounded(alpha: float) -> float:
    """A whole number where it is one but for rounding: engines print it, and some parse it."""
    nearest = round(alpha)
    return nearest if nearest and abs(alpha - nearest) < 1e-9 * nearest else alpha


def _pattern(name: str, names: Iterable[str]) -> str:
    """What PEFT takes for this layer only: it compares the ends of names, as expressions."""
    if any(other.endswith(f".{name}") for other in names):
        return f"^{re.escape(name)}"
    return name if is_plain(name) else re.escape(name)


def residual_name(source: str | None) -> str:
    """What the configuration of an adapter beside a residual names as its base."""
    return f"{_RESIDUAL_OF}{source or ''}"


def fits_residual(config: Mapping[str, Any]) -> bool:
    """Whether an adapter fits the residual of its base alone."""
    return str(config.get(_NAME)).startswith(_RESIDUAL_OF)


def base_name(config: Mapping[str, Any]) -> str | None:
    """The untouched base of a LoRA; None where its configuration names none."""
    return str(config.get(_NAME) or "").removeprefix(_RESIDUAL_OF) or None


def write_lora(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a LoRA in PEFT's layout; the tensors are contiguous."""
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes a LoRA's configuration in one order, so that equal ones make equal files."""
    described = dict(config)
    if isinstance(config.get("target_modules"), list):
        described["target_modules"] = sorted(config["target_modules"])
    # PEFT holds some lists of names as sets.
    text = json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False, default=sorted)
    write_bytes(folder / CONFIG_FILE, f"{text}\n".encode())


def read_lora(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and all tensors of a LoRA's folder, whoever wrote it.

    Raises:
        AdapterError: the folder is not there, incomplete or altered.
    """
    folder = Path(path)
    return read_config(folder), read_tensors(folder / WEIGHTS_FILE)


_SELECTION = fields.maybe(lambda value: fields.is_text(value) or fields.is_names(value))
_FLAG = fields.maybe(fields.is_flag)
# What a LoRA's configuration may say of what is read here or tells PEFT what to compute.
_CONFIG_FIELDS: dict[str, fields.Check] = {
    "r": fields.whole(1),
    "lora_alpha": fields.is_positive,
    "rank_pattern": lambda value: _is_pattern(value, fields.whole(1)),
    "alpha_pattern": lambda value: _is_pattern(value, fields.is_positive),
    "modules_to_save": fields.maybe(is_saved),
    "lora_dropout": fields.maybe(lambda value: fields.is_number(value, 0) and value < 1),
    "init_lora_weights": lambda value: _FLAG(value) or fields.is_text(value),
    "base_model_name_or_path": fields.maybe(fields.is_text),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _SELECTION),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"), _FLAG),
}


def _is_pattern(value: Any, size: fields.Check) -> bool:
    return value is None or (fields.is_object(value) and all(map(size, value.values())))


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, a LoRA's.

    Raises:
        AdapterError: it is missing, altered, or of another kind of adapter; or there is no folder.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    config = read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} holds no LoRA, but {config.get('peft_type')!r}")
    for name, sound in _CONFIG_FIELDS.items():
        if not sound(config.get(name)):
            found = repr(config.get(name))[:60]
            raise AdapterError(f"{folder / CONFIG_FILE} was altered: {name} is {found}")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(name) or {}:
            if not _PATTERN.fullmatch(pattern):
                raise AdapterError(
                    f"{name} in {folder / CONFIG_FILE} has {pattern[:60]!r}, and no regular "
                    "expression is run that stands in a file: write the names of the layers there"
                )
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AdapterError: it is missing, or holds something else.
    """
    try:
        value = fields.parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{file} is missing: copy it from where it was made") from error
    except ValueError as error:
        raise AdapterError(f"{file} is not JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file} was altered: it holds no object")
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The factors in a safetensors file, and what else it holds.

    Raises:
        AdapterError: it is missing, truncated or of another kind.
    """
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        raise AdapterError(
            f"{pickled} is not read here: load the folder with PeftModel.from_pretrained and save "
            "it again, which writes safetensors"
            if pickled.is_file()
            else f"{file} is missing: it holds the trained factors; copy it from where it was made"
        )
    try:
        # Copies: what is loaded is mapped, and would change if somebody wrote over the file.
        return {key: tensor.clone() for key, tensor in load_file(str(file)).items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is truncated or not a safetensors file ({error}): copy it again"
        ) from error


def lora_layers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, AdapterFactors]:
    """A, B and scaling of each layer, from what `read_lora` gave.

    Raises:
        AdapterError: a layer lacks a factor, or they do not fit each other or are not finite.
    """
    names = [match[1] for key in tensors if (match := FACTOR.fullmatch(key))]
    if not names:
        raise AdapterError(f"{folder / WEIGHTS_FILE} holds no factors of a LoRA's linear layers")
    check_tensors(config, tensors, folder)
    layers = {}
    rank_of = _sizes(config.get("rank_pattern"), config["r"])
    alpha_of = _sizes(config.get("alpha_pattern"), config["lora_alpha"])
    for name in dict.fromkeys(names):
        A, B = (tensors.get(factor_key(name, factor)) for factor in "AB")
        if (
            A is None
            or B is None
            or A.dtype != B.dtype
            or not A.ndim == B.ndim == 2
            or len(A) != B.shape[1]
            or 0 in (A.numel(), B.numel())
        ):
            raise AdapterError(
                f"{folder} lacks a factor of layer {name}, or its A and B do not fit: {MIXED}"
            )
        rank = rank_of(name)
        if len(A) != rank:
            raise AdapterError(
                f"layer {name} in {folder} has rank {len(A)}, but {CONFIG_FILE} says {rank}: "
                f"{MIXED}"
            )
        scaling = alpha_of(name) / (rank**0.5 if config.get("use_rslora") else rank)
        if not fields.is_positive(scaling):
            raise AdapterError(
                f"layer {name} in {folder} has the scaling {scaling}: {CONFIG_FILE} was altered"
            )
        layers[name] = AdapterFactors(A, B, scaling)
    return layers


def _sizes(patterns: Mapping[str, float] | None, otherwise: float) -> Callable[[str], float]:
    """What the first pattern that selects a layer says, as PEFT looks it up."""
    # PEFT's own expression (get_pattern_key), compiled once; `read_config` has vetted the patterns.
    compiled = [
        (re.compile(rf"(.*\.)?({pattern})$"), size) for pattern, size in (patterns or {}).items()
    ]
    return lambda name: next((size for found, size in compiled if found.match(name)), otherwise)


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Makes sure that what a LoRA's file holds can be the weights of one of this configuration.

    Raises:
        AdapterError: a factor is of another kind than floating point, a weight is NaN or Inf, or
            the configuration tells of other factors.
    """
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    largest = max((size for tensor in factors.values() for size in tensor.shape), default=0)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    magnitudes = any("lora_magnitude_vector" in key for key in factors)
    if factors and (rank > largest or magnitudes != bool(config.get("use_dora"))):
        raise AdapterError(
            f"{CONFIG_FILE} in {folder} says rank {rank} and use_dora={config.get('use_dora')}, "
            f"which {WEIGHTS_FILE} does not hold: {MIXED}"
        )
    for key, tensor in tensors.items():
        if tensor.dtype in _DTYPES:
            check_finite(layer_of(key), tensor)
        elif ".lora_" in key:
            raise AdapterError(
                f"{folder} has {key} in {tensor.dtype}, not a dtype of training: copy it again"
            )


def check_finite(layer: str, *weights: Tensor) -> None:
    """Refuses what a diverged training has left of a layer.

    Raises:
        AdapterError: a weight is NaN or Inf.
    """
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise AdapterError(
            f"layer {layer} has weights that are not finite: the training has diverged; take an "
            "earlier checkpoint"
        )
