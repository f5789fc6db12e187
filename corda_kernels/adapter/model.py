"""The adapter in a model, with PEFT or without: found in it, and saved."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from corda_kernels.adapter import folder
from corda_kernels.adapter.experts import by_expert, wrapped_layers
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.linear import CordaLinear
from corda_kernels.adapter.lora import fits_residual
from corda_kernels.adapter.record import Adapter, AdapterRecord
from corda_kernels.arguments import instance_of
from corda_kernels.errors import AdapterError, ModelError

# PEFT's name for a model's first adapter, whose files stand in the folder itself.
TRAINED = "default"
# Values of PEFT's init_lora_weights that start with B A = 0 and leave the base as it was.
_FROM_ZERO = (True, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class LiveAdapter:
    """A model's adapter whose A and B are the trained parameters, not copies.

    Attributes:
        layers: by the layer's name in the base.
        modules: what wraps each of these layers: PEFT's LoRA layer, or CordaLinear.
        record: how it was made; None where it was not made here, or stock PEFT loaded it.
    """

    layers: dict[str, LayerAdapter]
    modules: dict[str, nn.Module]
    record: AdapterRecord | None


def live_adapter(model: nn.Module, *, variants: bool = False) -> LiveAdapter:
    """The adapter that `model` carries.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without; or any PeftModel with
            a plain LoRA, which started at B A = 0.
        variants: whether layers may compute more than W x + B A x, as with DoRA, and be experts.

    Raises:
        AdapterError: there is none, or one whose starting point was not kept.
        ModelError: what is given is no model.
    """
    instance_of("the model", model, nn.Module, ModelError)
    made, initial = _noted(model)
    initial = initial or {}
    base: Any = model
    active, lacks = "", residual_marker(model) is not None
    if isinstance(model, PeftModel):
        if model.active_adapters != [TRAINED]:  # another one is not what these are of
            initial, made = {}, None
        base, config = model.get_base_model(), _active_config(model)
        active = model.active_adapter
        if not initial:
            check_start(config.init_lora_weights, f"adapter {active!r}")
        lacks = fits_residual(config.to_dict()) or residual_marker(base) is not None
    if lacks and not initial:
        raise AdapterError(
            "the adapter belongs on the residual W − B0 A0, and A0 and B0 are missing: attach it "
            "with load_for_training, which reads them from its folder"
        )
    layers: dict[str, LayerAdapter] = {}
    modules: dict[str, nn.Module] = {}
    adapted: dict[str, nn.Module] = wrapped_layers(base)
    adapted |= {n: m for n, m in base.named_modules() if isinstance(m, CordaLinear)}
    for name, module in adapted.items():
        if isinstance(module, CordaLinear):
            own = LayerAdapter(module.A, module.B, module.scaling)
        elif active and isinstance(module, LoraLayer) and active in module.lora_A:
            own = _factors(name, module, active)
            if not variants and (own.A.ndim == 3 or active in module.lora_variant):
                kind = "a parameter of fused experts" if own.A.ndim == 3 else "DoRA or the like"
                raise AdapterError(
                    f"layer {name} computes more than W x + B A x ({kind}): use a plain LoRA of "
                    "linear layers"
                )
        else:
            continue
        layers[name], modules[name] = replace(own, initial=initial.get(name)), module
    if not layers:
        raise AdapterError(
            "the model carries no adapter of linear layers: attach one with init_corda or "
            "load_for_training"
        )
    return LiveAdapter(layers, modules, made)


def _active_config(model: PeftModel) -> LoraConfig:
    """The configuration of the one active adapter, a LoRA."""
    names, configs = model.active_adapters, model.peft_config
    if len(names) != 1 or not isinstance(configs[names[0]], LoraConfig):
        kinds = ", ".join(f"{name} ({type(configs[name]).__name__})" for name in names)
        raise AdapterError(f"the active adapters are {kinds}: activate one LoRA with set_adapter")
    return configs[names[0]]


def _factors(name: str, module: Any, active: str) -> LayerAdapter:
    """A and B of one of PEFT's layers, the parameters themselves."""
    A, B = module.lora_A[active].weight, module.lora_B[active].weight
    if isinstance(module, ParamWrapper) and module.get_param().ndim == 3:
        A, B = by_expert(A, B, module.r[active])
    elif A.ndim != 2 or len(A) != module.r[active]:
        raise AdapterError(
            f"adapter {active!r} adapts {name}, which is no linear layer but a convolution: only "
            "LoRAs of linear layers are read"
        )
    return LayerAdapter(A, B, module.scaling[active])


def check_start(start: Any, adapter: str) -> None:
    """Makes sure that a LoRA began at B A = 0 and left its base as it was.

    Raises:
        AdapterError: its init_lora_weights, `start`, is another.
    """
    if start not in _FROM_ZERO:
        raise AdapterError(
            f"{adapter} was initialised by init_lora_weights={start!r}, which does not start at "
            "B A = 0, and PEFT does not keep its start: make it with init_corda, or save it by "
            "corda_kernels.peft_corda.save_adapter and take it up with load_for_training"
        )


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter in a model made by `init_corda` or `load_for_training`, as plain data.

    Raises:
        AdapterError: there is none, or none with a record.
    """
    layers = {name: layer.detach() for name, layer in live_adapter(model).layers.items()}
    return Adapter(layers, record_of(model))


def record_of(model: nn.Module) -> AdapterRecord:
    """How the adapter in a model made by `init_corda` or `load_for_training` was made.

    Raises:
        AdapterError: the model has no record of it.
    """
    made, _ = _noted(model)
    if made is None:
        raise AdapterError(
            "the model's adapter has no record of how it was made: stock PEFT saves and loads it "
            "all the same (save_pretrained); load_for_training also reads the record, corda.json, "
            "which may be copied from the folder of the start"
        )
    return made


def _noted(model: nn.Module) -> tuple[AdapterRecord | None, dict[str, AdapterFactors] | None]:
    """What `_carrying` has noted on a model, unless another adapter has the same name by now."""
    if isinstance(model, PeftModel):
        own = getattr(model, "corda_config", None)
        if own is None or model.peft_config.get(TRAINED) is not own:
            return None, None
    return getattr(model, "corda_record", None), getattr(model, "corda_initial", None)


def has_adapter(model: nn.Module) -> bool:
    """Whether layers of the model are wrapped by an adapter, this package's or PEFT's.

    Raises:
        ModelError: what is given is no model.
    """
    instance_of("the model", model, nn.Module, ModelError)
    return any(isinstance(module, CordaLinear | BaseTunerLayer) for module in model.modules())


def residual_marker(model: nn.Module) -> str | None:
    """The checksum of the initial factors that are missing from this model's weights, if any are.

    It stands in the model's config, so that `save_pretrained` keeps it.
    """
    return getattr(getattr(model, "config", None), "corda_residual", None)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the adapter's folder: what `save_pretrained` writes, the record and a model card.

    Args:
        model: result of `init_corda` or `load_for_training`, with PEFT or without.
        path: folder to write; an adapter in it is replaced, other files stay.


    Raises:
        AdapterError: the model carries no adapter with a record.
        OutputError: the folder cannot be written, or holds a model.
    """
    if not isinstance(model, PeftModel):
        folder.write_adapter(adapter_of(model), path)
        return
    made, config = record_of(model), model.peft_config[TRAINED]
    named = config.base_model_name_or_path
    with folder.staged_adapter(path, made, model.corda_initial) as staged:
        # The base, not its residual, is where PEFT looks up whether embeddings were resized.
        config.base_model_name_or_path = made.base["source"]
        try:
            model.save_pretrained(str(staged), selected_adapters=[TRAINED])
        finally:
            config.base_model_name_or_path = named
