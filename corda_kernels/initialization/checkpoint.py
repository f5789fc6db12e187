"""Adapters on disk: the folder that stock PEFT reads, with `corda.json` and the initial factors.

adapter_config.json, adapter_model.safetensors    the trained adapter
corda_initial/ with the same two                  the initial one, A0 and −B0
corda.json                                        how it was made, and a checksum of the initial
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from corda_kernels.errors import AdapterError, OutputError
from corda_kernels.files import check_output, json_bytes, write_bytes, write_json, write_tensors
from corda_kernels.initialization.adapter import (
    Adapter,
    AdapterRecord,
    LayerAdapter,
    check_base,
)
from corda_kernels.initialization.factors import residual
from corda_kernels.initialization.linear import CordaLinear, adapter_of_linears, attach_linears
from corda_kernels.initialization.peft_model import (
    INITIAL,
    RECORD_FILE,
    adapter_of_peft,
    attach_peft,
    lora_config,
)
from corda_kernels.linears import check_writable, is_linear, linear_shape, linear_weight

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter in a model made by `init_corda` or `load_for_training`, with PEFT or without.

    Raises:
        AdapterError: there is none, or its initial factors have been changed.
    """
    from peft import PeftModel

    adapter = adapter_of_peft(model) if isinstance(model, PeftModel) else adapter_of_linears(model)
    if adapter.initial_checksum() != adapter.record.initial_sha256:
        raise AdapterError(
            "the initial factors in this model are not those that it started from: they were "
            "trained, overwritten or cast; load the adapter again from its folder"
        )
    return adapter


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the adapter's folder, trained and initial factors; each file appears whole.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without.
        path: a folder; files of an adapter that it holds already are replaced.

    Raises:
        AdapterError: the model carries no adapter, or a damaged one.
        OutputError: the folder cannot be written, or holds a model.
    """
    write_adapter(adapter_of(model), path)


def write_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes an adapter's folder from plain data; see `save_adapter`."""
    folder = check_adapter_folder(path)
    # First of all: a record that cannot be written must not cost the adapter that stands there.
    record = json_bytes(adapter.record.to_json())
    config = lora_config(adapter)
    trained = {name: (layer.A, layer.B) for name, layer in adapter.layers.items()}
    initial = {name: (layer.A0, layer.B0.neg()) for name, layer in adapter.layers.items()}
    write_lora(folder / INITIAL, initial, config)
    write_lora(folder, trained, config)
    write_bytes(folder / RECORD_FILE, record)


def check_adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Makes sure that an adapter can be written into a folder.

    Raises:
        OutputError: it cannot, or holds a model: transformers would load that with the adapter.
    """
    folder = check_output(path, folder=True)
    if (folder / "config.json").exists():
        raise OutputError(
            f"{folder} holds a model, which would be loaded with the adapter on it from then on: "
            "choose another folder"
        )
    return folder


def write_lora(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], config: LoraConfig) -> None:
    """Writes one LoRA in PEFT's layout: A (rank, in) and B (out, rank) by module name."""
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[_key(name, "A")] = A.contiguous()
        tensors[_key(name, "B")] = B.contiguous()
    described = config.to_dict()
    described["inference_mode"] = True
    if not isinstance(config.target_modules, str):
        described["target_modules"] = sorted(described["target_modules"])
    write_tensors(folder / _WEIGHTS_FILE, tensors, {"format": "pt"})
    write_json(folder / _CONFIG_FILE, described)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter's folder: fresh, trained, or a checkpoint of Trainer.

    Raises:
        AdapterError: the folder is not there, incomplete or altered, or its initial factors are not
            those that the adapter started from.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    record_file = folder / RECORD_FILE
    if not record_file.is_file():
        raise AdapterError(
            f"{folder} has no {RECORD_FILE}: it was not written by this package, or the file was "
            "left behind; copy it from the folder of the fresh adapter"
        )
    try:
        value = json.loads(record_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{record_file} is not JSON ({error}): copy it again") from error
    record = AdapterRecord.from_json(value)
    trained = _read_lora(folder, "the trained factors")
    initial = _read_lora(folder / INITIAL, "the initial factors, without which it has no meaning")
    layers = {}
    for name, entry in record.layers.items():
        keys = _key(name, "A"), _key(name, "B")
        tensors = [source.get(key) for source in (trained, initial) for key in keys]
        if any(tensor is None or entry["rank"] not in tensor.shape for tensor in tensors):
            raise AdapterError(
                f"{folder} lacks factors of rank {entry['rank']} for layer {name}: its files belong"
                " to different adapters, or were altered"
            )
        A, B, A0, B0 = (tensor for tensor in tensors if tensor is not None)
        if A.ndim != 2 or B.ndim != 2 or A.shape != A0.shape or B.shape != B0.shape:
            raise AdapterError(
                f"the trained factors of layer {name} in {folder} have not the shapes of its "
                "initial ones: its files belong to different adapters, or were altered"
            )
        layers[name] = LayerAdapter(A, B, A0, B0.neg(), entry["scaling"])
    adapter = Adapter(layers, record)
    if adapter.initial_checksum() != record.initial_sha256:
        raise AdapterError(
            f"the initial factors in {folder / INITIAL} are not those that this adapter started "
            f"from: copy that folder again from the fresh adapter"
        )
    return adapter


def load_for_training(
    base_model: nn.Module, path: str | os.PathLike[str], *, use_peft: bool = True
) -> PeftModel | nn.Module:
    """Attaches an adapter from its folder, ready to train or to run.

    Args:
        base_model: the untouched base that the adapter was made for (or, for `residual="weight"`,
            also the one that `--save-base` stored). It is wrapped in place.
        path: a folder written by `save_adapter`, `corda-kernels init`, or Trainer.
        use_peft: False for CordaLinear layers in place of a PeftModel.

    Returns:
        A PeftModel, or `base_model` itself with its layers replaced.

    Raises:
        AdapterError: the folder is incomplete or altered, or belongs to another base.
        TargetError: the adapter has taken a part of the weights over, and the base is quantised.
    """
    adapter = read_adapter(path)
    return attach(base_model, adapter, use_peft=use_peft, copy=False)


def attach(
    base_model: nn.Module, adapter: Adapter, *, use_peft: bool = True, copy: bool = True
) -> PeftModel | nn.Module:
    """Attaches `adapter` to its base, in place; see `load_for_training`.

    With `copy=False` the model may take over the adapter's tensors, which training then changes.
    """
    linears = {name: module for name, module in base_model.named_modules() if is_linear(module)}
    missing = adapter.layers.keys() - linears.keys()
    if missing:
        raise AdapterError(
            f"the model has no linear layer {min(missing)}, which the adapter is for: load the base"
            f" it was made for, {adapter.record.base_name}, without another adapter"
        )
    modules = {name: linears[name] for name in adapter.layers}
    for name, layer in adapter.layers.items():
        shape = linear_shape(modules[name])
        if shape != (layer.B.shape[0], layer.A.shape[1]):
            raise AdapterError(
                f"layer {name} is {shape[0]} × {shape[1]}, but the adapter is for "
                f"{layer.B.shape[0]} × {layer.A.shape[1]}: load {adapter.record.base_name}"
            )
    check_at_hand(modules)
    marker = residual_marker(base_model)
    if marker is None:
        check_base(adapter.record, modules)
        if adapter.record.residual == "weight":
            subtract_initial(base_model, adapter)
    elif marker != adapter.record.initial_sha256:
        raise AdapterError(
            "this model is the residual of another adapter: load the untouched base, or the base "
            "that was saved with this adapter"
        )
    attach_to = attach_peft if use_peft else attach_linears
    return attach_to(base_model, adapter, copy=copy)


def check_at_hand(modules: Mapping[str, nn.Module]) -> None:
    """Refuses to attach to layers whose weights accelerate keeps elsewhere, and would put back.

    Raises:
        AdapterError: there is one.
    """
    for name, module in modules.items():
        if module.weight.is_meta:
            raise AdapterError(
                f"the weight of layer {name} is offloaded, and no adapter can be trained on it: "
                "write the adapter's folder (corda_adapter and write_adapter, or corda-kernels "
                "init), and attach it with load_for_training where the model fits"
            )


def has_adapter(model: nn.Module) -> bool:
    """Whether layers of the model are wrapped by an adapter, this package's or PEFT's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, CordaLinear | BaseTunerLayer) for module in model.modules())


def residual_marker(model: nn.Module) -> str | None:
    """The checksum of the initial factors that are missing from this model's weights, if any are.

    It stands in the model's config, so that `save_pretrained` keeps it.
    """
    return getattr(getattr(model, "config", None), "corda_residual", None)


@torch.no_grad()
def subtract_initial(model: nn.Module, adapter: Adapter) -> None:
    """Writes W' = W − s·B0·A0 into an untouched base, in place, and marks its config with it.

    Raises:
        TargetError: a layer is quantised.
    """
    check_writable(
        {name: model.get_submodule(name) for name in adapter.layers},
        "this adapter has taken a part of it over",
        "load the base in a floating dtype, or the residual that was saved with the adapter",
    )
    for name, layer in adapter.layers.items():
        weight = linear_weight(model.get_submodule(name))
        weight.copy_(residual(weight, layer.initial()))
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.corda_residual = adapter.record.initial_sha256


def _read_lora(folder: Path, what: str) -> dict[str, Tensor]:
    file = folder / _WEIGHTS_FILE
    if not file.is_file():
        raise AdapterError(f"{file} is missing: it holds {what}; copy it from where it was made")
    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is truncated or not a safetensors file ({error}): copy it again"
        ) from error


def _key(name: str, factor: str) -> str:
    return f"base_model.model.{name}.lora_{factor}.weight"
