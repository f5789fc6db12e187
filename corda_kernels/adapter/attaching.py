"""Adapters on a base: the base is checked, and made the residual of an adapter that needs it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda_kernels.adapter.adapter import Adapter, LayerAdapter, initial_checksum
from corda_kernels.adapter.factors import AdapterFactors, residual
from corda_kernels.adapter.folder import (
    read_adapter,
    read_initial,
    read_record,
    with_initial,
)
from corda_kernels.adapter.linear import attach_linears
from corda_kernels.adapter.live import residual_marker
from corda_kernels.adapter.lora_files import (
    FACTOR,
    WEIGHTS_FILE,
    check_tensors,
    layer_of,
    lora_layers,
    read_config,
    read_lora,
)
from corda_kernels.adapter.peft_model import attach_peft, check_wrapped, lora_config
from corda_kernels.adapter.record import AdapterRecord, check_base, target_modules
from corda_kernels.arguments import flag, instance_of, readable_path
from corda_kernels.errors import AdapterError, ModelError
from corda_kernels.linears import check_writable, is_linear, linear_shape, linear_weight, unpack

if TYPE_CHECKING:
    from peft import PeftModel


def load_for_training(
    base_model: nn.Module, path: str | os.PathLike[str], *, use_peft: bool = True
) -> PeftModel | nn.Module:
    """Attaches an adapter from its folder, ready to train or to run.

    This is PEFT's own `PeftModel.from_pretrained(base_model, path, is_trainable=True)` after a
    check that it is the right base, where the folder has corda.json. What else PEFT finds in the
    folder, such as embeddings that were trained too, it restores. Only an adapter with
    `residual="weight"` needs this function.

    Args:
        base_model: the untouched base that the adapter was made for (or, for `residual="weight"`,
            also the one that `--save-base` stored). It is wrapped in place.
        path: a folder written by `save_adapter`, `corda-kernels init`, PEFT or Trainer.
        use_peft: False for CordaLinear layers in place of a PeftModel.

    Returns:
        A PeftModel, or `base_model` itself with its layers replaced.

    Raises:
        AdapterError: the folder is incomplete or altered, or belongs to another base.
        ModelError: the base is no model.
        TargetError: the adapter has taken a part of the weights over, and the base is quantised.
    """
    instance_of("the base", base_model, nn.Module, ModelError)
    flag("use_peft", use_peft)
    folder = readable_path(path, AdapterError)
    if not use_peft:
        _check_factors_only(folder)
        return attach(base_model, read_adapter(folder), use_peft=False, copy=False)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    record, initial = read_record(folder), read_initial(folder)
    layers: dict[str, LayerAdapter] = {}
    if record is not None:
        adapter = read_adapter(folder)
        layers, described = adapter.layers, lora_config(adapter).to_dict()
        adapted = set(layers)
    else:
        if initial is not None:
            layers = with_initial(lora_layers(*read_lora(folder), folder), initial, folder)
        described, adapted = _described(base_model, folder)
    _check_fits(base_model, layers, record)
    _take_out(base_model, initial)
    if initial is not None:
        # PEFT would take A0 and B0 out itself, of a base that lacks them already.
        described["init_lora_weights"] = True
    wrapped = _from_pretrained(base_model, folder, described)
    check_wrapped(base_model, adapted, alone=record is not None)
    return _carry(wrapped, record, initial)


def _check_factors_only(folder: Path) -> None:
    """Refuses folders of which only PEFT restores everything."""
    others = sorted(key for key in read_lora(folder)[1] if not FACTOR.fullmatch(key))
    if others:
        raise AdapterError(
            f"{folder} holds more than the factors of linear layers ({others[0]}): load it with "
            "PEFT, which restores that"
        )


def _described(base_model: nn.Module, folder: Path) -> tuple[dict[str, Any], set[str]]:
    """What a LoRA's folder says to PEFT, and the model's layers that it has tensors of.

    Names stand in place of any regular expression that selects layers.

    Raises:
        AdapterError: the folder is damaged, or was made for layers that the model does not have.
    """
    config = read_config(folder)
    config.pop("runtime_config", None)  # PEFT ignores it too
    tensors: Mapping[str, Tensor] = {}
    if (folder / WEIGHTS_FILE).is_file():  # PEFT also reads adapter_model.bin
        tensors = read_lora(folder)[1]
        check_tensors(config, tensors, folder)
    modules = dict(base_model.named_modules())
    named = {layer_of(key) for key in tensors if ".lora_" in key}
    adapted = {name for name in named if hasattr(modules.get(name), "weight")}
    selections = [config.get(name) for name in ("target_modules", "exclude_modules")]
    if not config.get("layers_pattern") and not any(
        isinstance(selection, str) and selection != "all-linear" for selection in selections
    ):
        return config, adapted
    if adapted != named or not adapted:
        raise AdapterError(
            f"{folder} selects its layers by a regular expression, which is not run when it stands "
            "in a file, and not all of its tensors are of layers of this model "
            f"({min(named - adapted, default='there are none')}): load it with "
            "PeftModel.from_pretrained if you trust it"
        )
    names = {
        "target_modules": target_modules(base_model, adapted),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return config | names, adapted


def _from_pretrained(
    base_model: nn.Module, folder: Path, described: Mapping[str, Any]
) -> PeftModel:
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_peft_type(**described)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")  # they would start at random
            return PeftModel.from_pretrained(base_model, folder, is_trainable=True, config=config)
    except Exception as error:  # an altered configuration may lead PEFT to any
        raise AdapterError(f"PEFT cannot load {folder}: {error}") from error


def attach(
    base_model: nn.Module, adapter: Adapter, *, use_peft: bool = True, copy: bool = True
) -> PeftModel | nn.Module:
    """Attaches `adapter` to its base, in place; see `load_for_training`.

    With `copy=False` the model may take over the adapter's tensors, which training then changes.
    """
    _check_fits(base_model, adapter.layers, adapter.record)
    _take_out(base_model, adapter.initial)
    attach_to = attach_peft if use_peft else attach_linears
    wrapped = attach_to(base_model, adapter, copy=copy)
    return _carry(wrapped, adapter.record, adapter.initial)


def _carry(
    model: nn.Module, record: AdapterRecord | None, initial: dict[str, AdapterFactors] | None
) -> nn.Module:
    """Notes on a model how its adapter was made, and what it has taken out of the base."""
    carrier: Any = model
    carrier.corda_record = record
    carrier.corda_initial = initial
    return model


def _check_fits(
    base_model: nn.Module, layers: Mapping[str, LayerAdapter], record: AdapterRecord | None
) -> None:
    """Makes sure that layers belong to this base, whose weights can be trained on.

    Without a record it is only by their names and shapes.

    Raises:
        AdapterError: they do not.
    """
    base = "its base" if record is None else record.base_name
    linears = {name: module for name, module in base_model.named_modules() if is_linear(module)}
    missing = layers.keys() - linears.keys()
    if missing:
        raise AdapterError(
            f"the model has no linear layer {min(missing)}, which the adapter is for: load the base"
            f" it was made for, {base}, without another adapter"
        )
    modules = {name: linears[name] for name in layers}
    for name, layer in layers.items():
        shape = linear_shape(modules[name])
        if shape != (layer.B.shape[0], layer.A.shape[1]):
            raise AdapterError(
                f"layer {name} is {shape[0]} × {shape[1]}, but the adapter is for "
                f"{layer.B.shape[0]} × {layer.A.shape[1]}: load {base}"
            )
    check_at_hand(modules)
    unpack(modules)
    if record is not None and residual_marker(base_model) is None:
        check_base(record, modules)


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


def _take_out(base_model: nn.Module, initial: dict[str, AdapterFactors] | None) -> None:
    """Makes a base the residual of an adapter that has initial factors, unless it is that already.

    Raises:
        AdapterError: it is the residual of another one.
    """
    marker = residual_marker(base_model)
    if marker is None:
        if initial is not None:
            subtract_initial(base_model, initial)
    elif initial is None or marker != initial_checksum(initial):
        raise AdapterError(
            "this model is the residual of another adapter: load the untouched base, or the base "
            "that was saved with this adapter"
        )


@torch.no_grad()
def subtract_initial(model: nn.Module, initial: dict[str, AdapterFactors]) -> None:
    """Writes W' = W − s·B0·A0 into an untouched base, in place, and marks its config with it.

    Raises:
        TargetError: a layer is quantised.
    """
    check_writable(
        {name: model.get_submodule(name) for name in initial},
        "this adapter has taken a part of it over",
        "load the base in a floating dtype, or the residual that was saved with the adapter",
    )
    for name, factors in initial.items():
        weight = linear_weight(model.get_submodule(name))
        weight.copy_(residual(weight, factors))
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.corda_residual = initial_checksum(initial)
