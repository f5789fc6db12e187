"""A LoRA on disk as PEFT lays it out: its configuration and its tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from corda_kernels.errors import AdapterError
from corda_kernels.files import write_bytes, write_tensors
from corda_kernels.initialization.factors import AdapterFactors

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# PEFT's name for a model's first adapter, whose files stand in the folder itself.
TRAINED = "default"

# What an adapter beside a residual fits is no model that could be loaded: this goes before the
# base's name in its configuration.
_RESIDUAL_OF = "residual of "
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def factor_key(name: str, factor: str) -> str:
    """PEFT's name for a layer's A or B in a file."""
    return f"base_model.model.{name}.lora_{factor}.weight"


def write_lora(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a LoRA in PEFT's layout."""
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS_FILE, contiguous, {"format": "pt"})
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes a LoRA's configuration in one order, so that equal ones make equal files."""
    described = dict(config)
    if isinstance(config.get("target_modules"), list):
        described["target_modules"] = sorted(config["target_modules"])
    # PEFT holds some lists of names as sets.
    text = json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False, default=sorted)
    write_bytes(folder / CONFIG_FILE, f"{text}\n".encode())


def residual_name(source: str | None) -> str:
    """What the configuration of an adapter beside a residual names as its base."""
    return f"{_RESIDUAL_OF}{source or ''}"


def fits_residual(config: Mapping[str, Any]) -> bool:
    """Whether an adapter fits the residual of its base alone."""
    return str(config.get("base_model_name_or_path")).startswith(_RESIDUAL_OF)


def base_name(config: Mapping[str, Any]) -> str | None:
    """The untouched base of a LoRA; None where its configuration names none."""
    name = config.get("base_model_name_or_path")
    return None if name is None else str(name).removeprefix(_RESIDUAL_OF) or None


def read_lora(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and all tensors of a LoRA's folder, whoever wrote it.

    Raises:
        AdapterError: the folder is not there, incomplete or altered.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    return read_config(folder), read_tensors(folder / WEIGHTS_FILE, "the trained factors")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, a LoRA's.

    Raises:
        AdapterError: it is missing, altered, or of another kind of adapter.
    """
    config = read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} holds no LoRA, but {config.get('peft_type')!r}")
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [targets or ""]
    sound = {
        "r": _is_positive(config.get("r")),
        "lora_alpha": _is_positive(config.get("lora_alpha")),
        "rank_pattern": _is_pattern(config.get("rank_pattern")),
        "alpha_pattern": _is_pattern(config.get("alpha_pattern")),
        "target_modules": all(isinstance(name, str) for name in names),
    }
    for name, as_it_must in sound.items():
        if not as_it_must:
            found = repr(config.get(name))[:60]
            raise AdapterError(f"{folder / CONFIG_FILE} was altered: {name} is {found}")
    return config


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _is_pattern(value: Any) -> bool:
    """Whether a value says of layers, by regular expressions, how large something is."""
    if value is None:
        return True
    try:
        return all(re.compile(key) and _is_positive(size) for key, size in value.items())
    except (AttributeError, TypeError, re.error):
        return False


def lora_layers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, AdapterFactors]:
    """A, B and scaling of each layer, from what `read_lora` gave.

    Raises:
        AdapterError: a layer lacks a factor, or they do not fit each other.
    """
    from peft.utils.other import get_pattern_key

    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := FACTOR.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = tensor
    layers = {}
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    for name, pair in found.items():
        A, B = pair.get("A"), pair.get("B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"{folder} lacks a factor of layer {name}, or its A and B do not fit each other: "
                "its files belong to different adapters, or were altered"
            )
        alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
        rank = ranks.get(get_pattern_key(ranks, name), config["r"])
        if A.shape[0] != rank:
            raise AdapterError(
                f"layer {name} in {folder} has rank {A.shape[0]}, but {CONFIG_FILE} says {rank}: "
                "its files belong to different adapters, or were altered"
            )
        layers[name] = AdapterFactors(
            A, B, alpha / (rank**0.5 if config.get("use_rslora") else rank)
        )
    if not layers:
        raise AdapterError(f"{folder / WEIGHTS_FILE} holds no factors of a LoRA's linear layers")
    return layers


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AdapterError: it is missing, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{file} is missing: copy it from where it was made") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file} was altered: it holds no object")
    return value


def read_tensors(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Args:
        file: which.
        what: it holds, for messages.

    Raises:
        AdapterError: it is missing, truncated or of another kind.
    """
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        raise AdapterError(
            f"{pickled} is not read here: load the folder with PeftModel.from_pretrained and save "
            "it again, which writes safetensors"
            if pickled.is_file()
            else f"{file} is missing: it holds {what}; copy it from where it was made"
        )
    try:
        # Copies: what is loaded is mapped, and would change if somebody wrote over the file.
        return {key: tensor.clone() for key, tensor in load_file(str(file)).items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is truncated or not a safetensors file ({error}): copy it again"
        ) from error
