"""The adapter in a model, with PEFT or without: attached to its base, and its parameters found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.linear import CordaLinear
from corda_kernels.adapter.lora import TRAINED, fits_residual, lora_config
from corda_kernels.adapter.published import residual
from corda_kernels.adapter.record import (
    Adapter,
    AdapterRecord,
    check_base,
    initial_checksum,
    initial_factors,
)
from corda_kernels.arguments import instance_of
from corda_kernels.errors import AdapterError, ModelError
from corda_kernels.linears import check_writable, is_linear, linear_shape, linear_weight, unpack

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


def live_adapter(model: nn.Module) -> LiveAdapter:
    """The adapter that `model` carries.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without; or any PeftModel with
            a plain LoRA, which started at B A = 0.

    Raises:
        AdapterError: there is none, or one whose change against its start is not known.
        ModelError: what is given is no model.
    """
    live = factors_in(model)
    active = getattr(model, "active_adapter", None)
    for name, module in live.modules.items():
        if active in getattr(module, "lora_variant", ()):
            raise AdapterError(
                f"layer {name} computes more than W x + B A x (DoRA or another variant of LoRA): "
                "use a plain LoRA"
            )
    return live


def factors_in(model: nn.Module) -> LiveAdapter:
    """As `live_adapter`, of layers too that compute more than W x + B A x, as with DoRA."""
    instance_of("the model", model, nn.Module, ModelError)
    initial: dict[str, AdapterFactors] = getattr(model, "corda_initial", None) or {}
    record = getattr(model, "corda_record", None)
    base: Any = model
    none = "the model carries no adapter: attach one with init_corda or load_for_training"
    active = ""
    if isinstance(model, PeftModel):
        if model.active_adapters != [TRAINED]:  # another one is not what these are of
            initial, record = {}, None
        _check_start_is_known(model, initial)
        base, (active,) = model.get_base_model(), model.active_adapters
        none = f"adapter {active!r} adapts no linear layer"
    if residual_marker(base) is not None and not initial:
        raise AdapterError(
            "the base of this model has lost a part to its adapter, and what that was is not at "
            "hand: attach the adapter with load_for_training, which reads it from its folder"
        )
    layers: dict[str, LayerAdapter] = {}
    modules: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if isinstance(module, CordaLinear):
            own = AdapterFactors(module.A, module.B, module.scaling)
        elif active and isinstance(module, LoraLayer) and active in module.lora_A:
            A, B = module.lora_A[active].weight, module.lora_B[active].weight
            if A.ndim != 2 or len(A) != module.r[active]:
                raise AdapterError(
                    f"adapter {active!r} adapts {name}, which is no linear layer but a convolution "
                    "or the parameters of experts: only LoRAs of linear layers are read"
                )
            own = AdapterFactors(A, B, module.scaling[active])
        else:
            continue
        layers[name], modules[name] = LayerAdapter(own, initial.get(name)), module
    if not layers:
        raise AdapterError(none)
    return LiveAdapter(layers, modules, record)


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
    record: AdapterRecord | None = getattr(model, "corda_record", None)
    if record is None:
        raise AdapterError(
            "the model's adapter has no record of how it was made: stock PEFT saves and loads it "
            "all the same; load_for_training also reads the record, corda.json"
        )
    return record


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


def _check_start_is_known(model: Any, initial: Mapping[str, AdapterFactors]) -> None:
    """Makes sure that the one active adapter is a LoRA that began at B A = 0, or at `initial`.

    Raises:
        AdapterError: it is not.
    """
    if len(model.active_adapters) != 1:
        raise AdapterError(
            f"the PeftModel has {len(model.active_adapters)} active adapters "
            f"({', '.join(model.active_adapters)}): activate one with set_adapter"
        )
    (active,) = model.active_adapters
    config = model.peft_config[active]
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"adapter {active!r} is of kind {type(config).__name__}: only a LoRA changes its "
            "layers by B A"
        )
    if not initial:
        check_start(config.init_lora_weights, f"adapter {active!r}")
        if fits_residual(config.to_dict()):
            raise AdapterError(
                f"adapter {active!r} fits the residual of its base, and what that has lost is not "
                "at hand: attach the adapter with load_for_training, which reads it from its folder"
            )


def check_start(init_lora_weights: Any, adapter: str) -> None:
    """Makes sure that a LoRA began at B A = 0 and left its base as it was.

    Raises:
        AdapterError: it did not.
    """
    if init_lora_weights not in _FROM_ZERO:
        raise AdapterError(
            f"{adapter} was initialised by init_lora_weights={init_lora_weights!r}, which does not "
            "start at B A = 0, and PEFT does not keep where it started: make it with init_corda, "
            "or save it by corda_kernels.peft_corda.save_adapter and take it up with "
            "load_for_training"
        )


def attach(
    base_model: nn.Module, adapter: Adapter, *, use_peft: bool = True, copy: bool = True
) -> PeftModel | nn.Module:
    """Attaches `adapter` to its base, in place; see `load_for_training`.

    With `copy=False` the model may take over the adapter's tensors, which training then changes.
    """
    prepare_base(base_model, adapter.layers, adapter.record)
    if use_peft:
        wrapped = _attach_peft(base_model, adapter, copy=copy)
    else:
        wrapped = base_model.requires_grad_(False)
        for name, layer in adapter.layers.items():
            linear = CordaLinear(base_model.get_submodule(name), layer.trained, copy=copy)
            base_model.set_submodule(name, linear)
    return carrying(wrapped, adapter.record, adapter.initial)


def _attach_peft(model: nn.Module, adapter: Adapter, *, copy: bool) -> PeftModel:
    config = lora_config(adapter)
    # PEFT's own start would be thrown away, but for what it derives from the model.
    derived = bool(config.use_dora or config.modules_to_save)
    source = config.base_model_name_or_path
    config.base_model_name_or_path = None  # PEFT sets it, and warns of any other
    wrapped: PeftModel = get_peft_model(
        model, config, adapter_name=TRAINED, low_cpu_mem_usage=not derived
    )
    config.base_model_name_or_path = source
    check_wrapped(model, adapter.layers.keys())
    for name, layer in adapter.layers.items():
        lora: Any = model.get_submodule(name)
        device = lora.get_base_layer().weight.device
        # In the adapter's own dtype, for PEFT gives adapters of a float64 base its dtype.
        lora.lora_A[TRAINED].weight = nn.Parameter(layer.A.to(device, copy=copy))
        lora.lora_B[TRAINED].weight = nn.Parameter(layer.B.to(device, copy=copy))
    return wrapped


def carrying(
    model: nn.Module, record: AdapterRecord | None, initial: dict[str, AdapterFactors] | None
) -> nn.Module:
    """Notes on a model how its adapter was made, and what it has taken out of the base."""
    carrier: Any = model
    carrier.corda_record = record
    carrier.corda_initial = initial
    return model


def prepare_base(
    base_model: nn.Module, layers: Mapping[str, LayerAdapter], record: AdapterRecord | None
) -> None:
    """Makes sure that layers belong to this base, and makes it their residual where they have
    initial factors, unless it is that already. Without a record it goes by names and shapes.

    Raises:
        AdapterError: they do not, or the base is the residual of another adapter.
        TargetError: a part of a quantised weight would have to be taken out.
    """
    base = "its base" if record is None else record.base_name
    linears = {name: module for name, module in base_model.named_modules() if is_linear(module)}
    for name, layer in layers.items():
        if name not in linears:
            raise AdapterError(
                f"the model has no linear layer {name}, which the adapter is for: load the base "
                f"it was made for, {base}, without another adapter"
            )
        shape = linear_shape(linears[name])
        if shape != (layer.B.shape[0], layer.A.shape[1]):
            raise AdapterError(
                f"layer {name} is {shape[0]} × {shape[1]}, but the adapter is for "
                f"{layer.B.shape[0]} × {layer.A.shape[1]}: load {base}"
            )
    modules = {name: linears[name] for name in layers}
    check_at_hand(modules)
    unpack(modules)
    marker, initial = residual_marker(base_model), initial_factors(layers)
    if marker is not None and (initial is None or marker != initial_checksum(initial)):
        raise AdapterError(
            "this model is the residual of another adapter: load the untouched base, or the base "
            "that was saved with this adapter"
        )
    if marker is None:
        if record is not None:
            check_base(record, modules)
        if initial is not None:
            subtract_initial(base_model, initial)


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


def check_wrapped(model: nn.Module, names: Set[str], *, alone: bool = True) -> None:
    """Makes sure that PEFT, which finds layers by the ends of their names, found certain layers.

    Args:
        model: the base.
        names: of the layers that it must have found.
        alone: whether it must have found no others.

    Raises:
        AdapterError: it did not.
    """
    found = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    odd = found ^ names if alone else names - found
    if odd:
        raise AdapterError(
            f"PEFT and the adapter disagree on {min(odd)}: PEFT finds "
            "layers by the ends of their names; load the base that the adapter was made for, or "
            "attach with use_peft=False"
        )


def not_selectable(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The layers that PEFT adapts in no LoRA of this model, each with the reason.

    It takes the ends of some names for parameters of fused experts, in models that have such, and
    refuses some layers of others. It is asked itself, one end of a name at a time.
    """
    reasons = {}
    for end in sorted({name.rpartition(".")[2] for name in names}):
        config = LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(config, model, None)
            BaseTuner._check_target_module_compatiblity(None, config, model, end)
        except ValueError as error:
            reasons[end] = " ".join(str(error).split())
            continue
        if end not in config.target_modules:
            reasons[end] = f"PEFT takes {end!r} for parameters of fused experts in this model"
    return {name: reasons[end] for name in names if (end := name.rpartition(".")[2]) in reasons}
