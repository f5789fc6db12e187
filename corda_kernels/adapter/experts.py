"""Adapters of fused experts as PEFT's `target_parameters` lays them out.

An adapter of a parameter (E, ·, ·) has factors A (E, rank, n) and B (E, m, rank), one pair for each
expert. PEFT keeps them as lora_A (E·rank, n), expert by expert, and lora_B (m, rank·E), with the
expert fastest, and nests the wrappers of parameters of one module: down_proj's is the outer one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.experts import ATTRIBUTES, ExpertParameter

_INNER = ".base_layer"
_LAST = "down_proj"
_REWRITTEN = (
    "PEFT takes its name for a parameter of fused experts, and reaches its weight without "
    "lora_dropout, use_dora or quantisation only"
)


def is_swapped(parameter: ExpertParameter) -> bool:
    """Whether PEFT takes the parameter to be stored as (E, out, in), by which it goes later too
    (`_did_swap_in_out_features`)."""
    return not getattr(parameter.module, "is_transposed", False)


def oriented(parameter: ExpertParameter, factors: LayerAdapter) -> LayerAdapter:
    """The factors of ΔW_e as PEFT has them: of ΔW_eᵀ where it takes inputs for outputs.

    So it does with Llama 4, which stores (E, in, out) and does not say so.
    """
    if parameter.transposed != is_swapped(parameter):
        return factors
    return replace(factors, A=factors.B.mT.contiguous(), B=factors.A.mT.contiguous())


def expert_shape(parameter: ExpertParameter) -> tuple[int, int, int]:
    """(E, m, n) of the change that PEFT makes of the factors."""
    shape = parameter.outputs, parameter.inputs
    if parameter.transposed == is_swapped(parameter):
        shape = parameter.inputs, parameter.outputs
    return parameter.experts, *shape


def peft_layout(factors: AdapterFactors) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of factors, of experts or of a linear layer."""
    A, B = factors.A, factors.B
    if A.ndim == 3:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A.contiguous(), B.contiguous()


def by_expert(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (E, ·, ·) from lora_A and lora_B: views of them."""
    experts = len(A) // rank
    return A.reshape(experts, rank, -1), B.reshape(len(B), rank, experts).permute(2, 0, 1)


def file_name(name: str, factors: AdapterFactors, names: Collection[str]) -> str:
    """What PEFT calls the module that holds the factors of the layer or parameter `name`."""
    if factors.A.ndim == 2:
        return name
    module, _, attribute = name.rpartition(".")
    return module if attribute == _LAST or f"{module}.{_LAST}" not in names else module + _INNER


def parameter_of(module: str, targets: Iterable[str] | None) -> str | None:
    """The expert parameter whose factors PEFT's file has under the name `module`, if it is such.

    Args:
        module: as `file_name` gives it.
        targets: PEFT's `target_parameters`.
    """
    outer = module.removesuffix(_INNER)
    found = [each for each in ATTRIBUTES if is_target(f"{outer}.{each}", targets)]
    inner = [each for each in found if each != _LAST]
    chosen = inner if outer != module or _LAST not in found else [_LAST]
    return f"{outer}.{chosen[0]}" if chosen else None


def is_target(parameter: str, targets: Iterable[str] | None) -> bool:
    """Whether `target_parameters` of PEFT's, a module's name before each, select a parameter."""
    return any(f".{parameter}".endswith(f".{each}") for each in targets or () if "." in each)


def peft_key(name: str, targets: Iterable[str] | None) -> str:
    """By what PEFT looks up the rank of a layer or parameter."""
    weight = f"{name}.weight"
    return weight if is_target(weight, targets) else name


def wrapped_layers(model: nn.Module) -> dict[str, Any]:
    """What PEFT has wrapped, by the names of the layers and of the expert parameters."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            name = name.replace(_INNER, "")
            if module.parameter_name != "weight":
                name = f"{name}.{module.parameter_name}"
        elif not isinstance(module, BaseTunerLayer):
            continue
        found[name] = module
    return found


def rewritten_layers(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Linear layers whose names PEFT takes, in `target_modules`, for parameters of fused experts,
    such as shared experts' gate_proj. Their weights go into `target_parameters`."""
    reasons = not_selectable(model, names)
    return {name for name, reason in reasons.items() if reason == _REWRITTEN}


def not_selectable(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The layers that `target_modules` of PEFT's reaches in no LoRA of this model, with the reason.

    PEFT takes the ends of some names for parameters of fused experts, in models that have such, and
    refuses some layers of others. It is asked itself, one end of a name at a time.
    """
    reasons = {}
    for end in sorted({name.rpartition(".")[2] for name in names}):
        config = LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(config, model, None)
            rewritten = end not in config.target_modules
        except ValueError:  # one of several that are fused into one parameter
            rewritten = True
        if rewritten:
            reasons[end] = _REWRITTEN
            continue
        try:
            BaseTuner._check_target_module_compatiblity(None, config, model, end)
        except ValueError as error:
            reasons[end] = " ".join(str(error).split())
    return {name: reasons[end] for name in names if (end := name.rpartition(".")[2]) in reasons}
