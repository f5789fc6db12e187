"""The adapter under PEFT: a stock PeftModel with one LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from corda_kernels.adapter.adapter import Adapter
from corda_kernels.adapter.lora_files import TRAINED, is_plain, residual_name
from corda_kernels.errors import AdapterError


def attach_peft(model: nn.Module, adapter: Adapter, *, copy: bool = True) -> PeftModel:
    """Wraps `model` with the adapter, ready to train."""
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


def lora_config(adapter: Adapter) -> LoraConfig:
    """The LoraConfig of an adapter.

    Layers of fewer rows than the largest stand in `rank_pattern`, those of another alpha in
    `alpha_pattern`, by their full names. Without a budget there is neither.
    """
    record = adapter.record
    names = {name: _pattern(name, adapter.layers) for name in adapter.layers}
    ranks = {name: layer.trained.rank for name, layer in adapter.layers.items()}
    rank = max(ranks.values())
    alphas = {name: _whole(layer.scaling * ranks[name]) for name, layer in adapter.layers.items()}
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


def _whole(alpha: float) -> float:
    """A whole number where it is one but for rounding: engines print it, and some parse it."""
    nearest = round(alpha)
    return nearest if nearest and abs(alpha - nearest) < 1e-9 * nearest else alpha


def _pattern(name: str, names: Iterable[str]) -> str:
    """What PEFT takes for this layer only: it compares the ends of names, as expressions."""
    if any(other.endswith(f".{name}") for other in names):
        return f"^{re.escape(name)}"
    return name if is_plain(name) else re.escape(name)
