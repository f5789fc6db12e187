"""The adapter in a model while it is trained or run: its parameters themselves, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corda_kernels.errors import AdapterError
from corda_kernels.initialization import AdapterRecord, LayerAdapter
from corda_kernels.initialization.linear import CordaLinear, live_adapter_of_linears
from corda_kernels.initialization.peft_model import (
    CordaPeftModel,
    CordaPeftModelForCausalLM,
    live_adapter_of_peft,
)
from corda_kernels.linears import linear_weight

# Values of PEFT's init_lora_weights that start with B A = 0 and leave the base as it was.
_FROM_ZERO = (True, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class LiveAdapter:
    """A model's adapter whose A and B are the trained parameters, not copies.

    Attributes:
        layers: by the layer's name in the base; their A0 and B0 are frozen.
        modules: what wraps each of these layers: PEFT's LoRA layer, or CordaLinear.
        record: how it was made; None for a plain LoRA.
    """

    layers: dict[str, LayerAdapter]
    modules: dict[str, nn.Module]
    record: AdapterRecord | None


def live_adapter(model: nn.Module) -> LiveAdapter:
    """The adapter that `model` carries.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without; or a PeftModel with
            a plain LoRA, which started at B A = 0.

    Raises:
        AdapterError: there is none, or one whose change against its start is not B A − B0 A0.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        adapter = live_adapter_of_linears(model)
        return _live(model, adapter.layers, adapter.record)
    if isinstance(model, CordaPeftModel | CordaPeftModelForCausalLM):
        adapter = live_adapter_of_peft(model)
        return _live(model.get_base_model(), adapter.layers, adapter.record)
    base = model.get_base_model()
    return _live(base, _plain_lora(model, base), None)


def starts_at_zero_by_component(model: Any) -> bool:
    """Whether each component's Bᵢ Aᵢ began at 0, or where A0 and B0 say; not only their sum."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or isinstance(
        model, CordaPeftModel | CordaPeftModelForCausalLM
    ):
        return True
    active = model.active_adapters[0]
    return getattr(model.peft_config[active], "init_lora_weights", True) != "orthogonal"


def untouched_weight(live: LiveAdapter, name: str) -> Tensor:
    """W (out, in) of a layer as it was before the adapter took a part of it over."""
    module: Any = live.modules[name]
    weight = linear_weight(module.base if isinstance(module, CordaLinear) else module.base_layer)
    if live.record is not None and live.record.residual == "weight":
        return weight + live.layers[name].initial_product().to(weight)
    return weight.detach()


class UntouchedWeights(Mapping[str, Tensor]):
    """`untouched_weight` of every layer, each made when it is asked for."""

    def __init__(self, live: LiveAdapter) -> None:
        self._live = live

    def __getitem__(self, name: str) -> Tensor:
        return untouched_weight(self._live, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._live.layers)

    def __len__(self) -> int:
        return len(self._live.layers)


def _live(
    base: nn.Module, layers: dict[str, LayerAdapter], record: AdapterRecord | None
) -> LiveAdapter:
    return LiveAdapter(layers, {name: base.get_submodule(name) for name in layers}, record)


def _plain_lora(model: Any, base: nn.Module) -> dict[str, LayerAdapter]:
    """The layers of the one active LoRA of a PeftModel that is not this package's."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

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
    start = config.init_lora_weights
    if start not in _FROM_ZERO:
        raise AdapterError(
            f"adapter {active!r} was initialised by init_lora_weights={start!r}, which does not "
            "start at B A = 0, and PEFT does not keep where it started: make it with init_corda, "
            "or save it by corda_kernels.integrations.peft.save_adapter and take it up with "
            "load_for_training"
        )
    layers = {}
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer) or active not in module.lora_A:
            continue
        if active in module.lora_variant:
            raise AdapterError(
                f"layer {name} computes more than W x + B A x (DoRA or another variant of LoRA): "
                "use a plain LoRA"
            )
        A, B = module.lora_A[active].weight, module.lora_B[active].weight
        A0, B0 = A.detach().clone(), B.new_zeros(B.shape)
        layers[name] = LayerAdapter(A, B, A0, B0, module.scaling[active])
    if not layers:
        raise AdapterError(f"adapter {active!r} adapts no linear layer")
    return layers
