"""The files of a LoRA, whoever wrote it, as PEFT lays them out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from corda_kernels import fields
from corda_kernels.adapter.experts import by_expert, parameter_of, peft_key
from corda_kernels.adapter.factors import LayerAdapter
from corda_kernels.adapter.record import NAME_PATTERN, RESIDUAL_OF, factor_key, is_saved
from corda_kernels.arguments import readable_path
from corda_kernels.errors import AdapterError
from corda_kernels.files import write_bytes, write_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
MIXED = "files of different adapters, or altered ones: copy all from one folder"
_Contents = TypeVar("_Contents")


@dataclass(frozen=True, eq=False)
class Lora:
    """What a LoRA's folder holds, whoever wrote it.

    Attributes:
        folder: where it was read.
        config: PEFT's LoraConfig.
        tensors: by PEFT's names: the factors, and what else was trained.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


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


def fits_residual(config: Mapping[str, Any]) -> bool:
    """Whether an adapter fits the residual of its base alone."""
    return str(config.get("base_model_name_or_path")).startswith(RESIDUAL_OF)


def base_name(config: Mapping[str, Any]) -> str | None:
    """The untouched base of a LoRA; None where its configuration names none."""
    return str(config.get("base_model_name_or_path") or "").removeprefix(RESIDUAL_OF) or None


def layer_of(key: str, config: Mapping[str, Any]) -> str:
    """The layer, or expert parameter, that a tensor in the file of a LoRA belongs to."""
    module = key.removeprefix("base_model.model.").partition(".lora_")[0]
    return parameter_of(module, config.get("target_parameters")) or module


def read_lora(path: str | os.PathLike[str]) -> Lora:
    """Reads a LoRA's folder, whoever wrote it.

    Raises:
        AdapterError: the folder is not there, incomplete or altered, or of another kind of adapter;
            a factor is of another kind than floating point, a weight is NaN or Inf, or the
            configuration tells of other factors.
    """
    folder = readable_path(path, AdapterError)
    config = _read_config(folder / CONFIG_FILE)
    missing = (
        "copy it from where it was made, or load the folder with PeftModel.from_pretrained, which "
        "also reads adapter_model.bin, and save it again"
    )
    return Lora(folder, config, read_tensors(folder / WEIGHTS_FILE, config, missing))


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
    "target_parameters": fields.maybe(fields.is_names),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _SELECTION),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"), _FLAG),
}


def _is_pattern(value: Any, size: fields.Check) -> bool:
    return value is None or (fields.is_object(value) and all(map(size, value.values())))


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file, "it is no adapter, or was copied in part")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{file.parent} holds no LoRA, but {config.get('peft_type')!r}")
    for name, sound in _CONFIG_FIELDS.items():
        if not sound(config.get(name)):
            raise AdapterError(f"{file} was altered: {name} is {repr(config.get(name))[:60]}")
    for pattern in [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]:
        if not NAME_PATTERN.fullmatch(pattern):
            raise AdapterError(
                f"{file} holds the regular expression {pattern[:60]!r}, and expressions from files "
                "are not run: write the names of the layers there"
            )
    return config


def read_json(file: Path, missing: str = "copy it from where it was made") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AdapterError: it is missing, or holds something else.
    """
    value = _read(file, lambda file: fields.parse_json(file.read_text("utf-8")), "JSON", missing)
    if not isinstance(value, dict):
        raise AdapterError(f"{file} was altered: it holds no object")
    return value


def _read(file: Path, read: Callable[[Path], _Contents], kind: str, missing: str) -> _Contents:
    """What `read` gives of a file; `missing` is the remedy where it is not there."""
    try:
        return read(file)
    except FileNotFoundError as error:
        if not file.parent.is_dir():
            raise AdapterError(f"{file.parent}: no such adapter folder") from error
        raise AdapterError(f"{file.parent} has no {file.name}: {missing}") from error
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(f"{file} is truncated or not {kind} ({error}): copy it again") from error


def read_tensors(file: Path, config: Mapping[str, Any], missing: str) -> dict[str, Tensor]:
    """What a safetensors file holds, if it can be the weights of a LoRA of this configuration."""
    # Copies: what is loaded is mapped, and would change if somebody wrote over the file.
    tensors = _read(
        file,
        lambda file: {key: tensor.clone() for key, tensor in load_file(file).items()},
        "a safetensors file",
        missing,
    )
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    # PEFT would allocate whatever rank the configuration names.
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    largest = max((size for tensor in factors.values() for size in tensor.shape), default=rank)
    magnitudes = any("lora_magnitude_vector" in key for key in factors)
    if rank > largest or (factors and magnitudes != bool(config.get("use_dora"))):
        raise AdapterError(
            f"{file} does not match {CONFIG_FILE} (rank {rank}, "
            f"use_dora={config.get('use_dora')}): {MIXED}"
        )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize > 1:
            check_finite(layer_of(key, config), tensor)
        elif key in factors:
            raise AdapterError(
                f"{file} has {key} in {tensor.dtype}, which no LoRA trains: copy it again"
            )
    return tensors


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


def lora_layers(lora: Lora) -> dict[str, LayerAdapter]:
    """A, B and scaling of each linear layer and expert parameter.

    Raises:
        AdapterError: there is none, or one lacks a factor, or they do not fit each other or the
            configuration.
    """
    config, tensors = lora.config, lora.tensors
    rank_of = _sizes(config.get("rank_pattern"), config["r"])
    alpha_of = _sizes(config.get("alpha_pattern"), config["lora_alpha"])
    targets = config.get("target_parameters")
    layers = {}
    for module in dict.fromkeys(found[1] for key in tensors if (found := FACTOR.fullmatch(key))):
        A, B = (tensors.get(factor_key(module, factor), torch.empty(0)) for factor in "AB")
        parameter = parameter_of(module, targets)
        name = parameter or module
        key = peft_key(name, targets)
        rank = rank_of(key)
        scaling = alpha_of(key) / (rank**0.5 if config.get("use_rslora") else rank)
        matrices = A.ndim == B.ndim == 2 and A.numel() and B.numel() and A.dtype == B.dtype
        fit = matrices and len(A) == B.shape[1] and fields.is_positive(scaling)
        if not fit or (len(A) % rank if parameter else len(A) != rank):
            raise AdapterError(
                f"{lora.folder} lacks a factor of layer {name}, or its A and B do not fit each "
                f"other, rank {rank} and scaling {scaling:g} of {CONFIG_FILE}: {MIXED}"
            )
        if parameter:
            A, B = by_expert(A, B, int(rank))
        layers[name] = LayerAdapter(A, B, scaling)
    if not layers:
        raise AdapterError(f"{lora.folder} holds no factors of linear layers: {MIXED}")
    return layers


def _sizes(patterns: Mapping[str, float] | None, otherwise: float) -> Callable[[str], float]:
    """What the first pattern that selects a layer says, as PEFT looks it up."""
    # PEFT's own expression (get_pattern_key), compiled once; `_read_config` has vetted patterns.
    compiled = [
        (re.compile(rf"(.*\.)?({pattern})$"), size) for pattern, size in (patterns or {}).items()
    ]
    return lambda name: next((size for found, size in compiled if found.match(name)), otherwise)


def check_only_factors(tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Refuses tensors that are no factors of linear layers.

    Raises:
        AdapterError: there is one.
    """
    others = sorted(key for key in tensors if not FACTOR.fullmatch(key))
    if others:
        raise AdapterError(
            f"it holds more than the factors of linear layers ({others[0]}): {remedy}"
        )
