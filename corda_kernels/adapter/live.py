"""The adapter in a model while it is trained or run: its parameters themselves, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from corda_kernels.adapter.adapter import Adapter, LayerAdapter
from corda_kernels.adapter.factors import AdapterFactors
from corda_kernels.adapter.linear import CordaLinear
from corda_kernels.adapter.lora_files import TRAINED, fits_residual
from corda_kernels.adapter.record import AdapterRecord
from corda_kernels.arguments import instance_of
from corda_kernels.errors import AdapterError, ModelError

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
    from peft import PeftModel

    instance_of("the model", model, nn.Module, ModelError)
    initial: dict[str, AdapterFactors] = getattr(model, "corda_initial", None) or {}
    record = getattr(model, "corda_record", None)
    if isinstance(model, PeftModel):
        if model.active_adapters != [TRAINED]:  # another one is not what these are of
            initial, record = {}, None
        check_start_is_known(model, initial)
        base, (trained, modules) = model.get_base_model(), _lora_layers(model)
    else:
        base, (trained, modules) = model, _corda_linears(model)
    if residual_marker(base) is not None and not initial:
        raise AdapterError(
            "the base of this model has lost a part to its adapter, and what that was is not at "
            "hand: attach the adapter with load_for_training, which reads it from its folder"
        )
    layers = {name: LayerAdapter(own, initial.get(name)) for name, own in trained.items()}
    return LiveAdapter(layers, modules, record)


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter in a model made by `init_corda` or `load_for_training`, as plain data.

    Raises:
        AdapterError: there is none, or none with a record.
    """
    live = live_adapter(model)
    layers = {
        name: LayerAdapter(layer.trained.detach(), layer.initial)
        for name, layer in live.layers.items()
    }
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    instance_of("the model", model, nn.Module, ModelError)
    return any(isinstance(module, CordaLinear | BaseTunerLayer) for module in model.modules())


def residual_marker(model: nn.Module) -> str | None:
    """The checksum of the initial factors that are missing from this model's weights, if any are.

    It stands in the model's config, so that `save_pretrained` keeps it.
    """
    return getattr(getattr(model, "config", None), "corda_residual", None)


def _corda_linears(model: nn.Module) -> tuple[dict[str, AdapterFactors], dict[str, nn.Module]]:
    modules = {
        name: module for name, module in model.named_modules() if isinstance(module, CordaLinear)
    }
    if not modules:
        raise AdapterError(
            "the model carries no adapter: attach one with init_corda or load_for_training"
        )
    found = {
        name: AdapterFactors(module.A, module.B, module.scaling) for name, module in modules.items()
    }
    return found, dict(modules)


def check_start_is_known(model: Any, initial: Mapping[str, AdapterFactors]) -> None:
    """Makes sure that the one active adapter is a LoRA that began at B A = 0, or at `initial`.

    Raises:
        AdapterError: it is not.
    """
    from peft import LoraConfig

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


def _lora_layers(model: Any) -> tuple[dict[str, AdapterFactors], dict[str, nn.Module]]:
    """The layers of the one active LoRA of a PeftModel."""
    from peft.tuners.lora import LoraLayer

    (active,) = model.active_adapters
    found: dict[str, AdapterFactors] = {}
    modules: dict[str, nn.Module] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or active not in module.lora_A:
            continue
        if active in module.lora_variant:
            raise AdapterError(
                f"layer {name} computes more than W x + B A x (DoRA or another variant of LoRA): "
                "use a plain LoRA"
            )
        A, B = module.lora_A[active].weight, module.lora_B[active].weight
        found[name] = AdapterFactors(A, B, module.scaling[active])
        modules[name] = module
    if not found:
        raise AdapterError(f"adapter {active!r} adapts no linear layer")
    return found, modules
