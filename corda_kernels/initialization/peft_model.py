"""The adapter under PEFT: a LoRA pair that stock PEFT, Trainer and TRL save and resume.

Adapter `default` holds the trainable A, B; adapter `corda_initial` the initial A0, −B0. With both
active their sum starts at zero on the untouched base. With `residual="weight"` the base lacks B0 A0
already, and `corda_initial` stays inactive, only carried along so that it is never lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from corda_kernels.errors import AdapterError
from corda_kernels.files import write_json
from corda_kernels.initialization.adapter import Adapter, AdapterRecord, LayerAdapter

TRAINED = "default"
INITIAL = "corda_initial"
RECORD_FILE = "corda.json"


class _Corda:
    """What a PeftModel lacks: the pair stays active, and corda.json is saved with it."""

    corda_record: AdapterRecord

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """As in PEFT, but `default` brings its frozen partner along.

        Trainer calls this when it resumes, and would otherwise leave the trainable half alone.
        """
        super().set_adapter(adapter_name, inference_mode=inference_mode)  # type: ignore[misc]
        if adapter_name == TRAINED and self.corda_record.residual == "pair":
            self.base_model.set_adapter(  # type: ignore[attr-defined]
                [TRAINED, INITIAL], inference_mode=inference_mode
            )

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, with `corda.json` beside the adapters."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_json(Path(save_directory) / RECORD_FILE, self.corda_record.to_json())


class CordaPeftModel(_Corda, PeftModel):  # type: ignore[misc]
    """A PeftModel that carries a CorDA adapter; `corda_record` says how it was made."""


class CordaPeftModelForCausalLM(_Corda, PeftModelForCausalLM):  # type: ignore[misc]
    """A PeftModelForCausalLM that carries a CorDA adapter."""


def attach_peft(
    model: nn.Module, adapter: Adapter, *, copy: bool = True
) -> CordaPeftModel | CordaPeftModelForCausalLM:
    """Wraps `model` with the adapter; only A and B of `default` are trainable."""
    causal = hasattr(model, "prepare_inputs_for_generation")
    kind = CordaPeftModelForCausalLM if causal else CordaPeftModel
    # PEFT's own start would be thrown away: with low_cpu_mem_usage it makes none.
    config = lora_config(adapter)
    wrapped = kind(model, config, adapter_name=TRAINED, low_cpu_mem_usage=True)
    _check_wrapped(model, adapter)
    wrapped.corda_record = adapter.record
    wrapped.add_adapter(INITIAL, lora_config(adapter), low_cpu_mem_usage=True)
    for name, layer in adapter.layers.items():
        lora: Any = model.get_submodule(name)
        device = lora.get_base_layer().weight.device
        # In the adapter's own dtype, for PEFT gives adapters of a float64 base its dtype.
        lora.lora_A[TRAINED].weight = nn.Parameter(layer.A.to(device, copy=copy))
        lora.lora_B[TRAINED].weight = nn.Parameter(layer.B.to(device, copy=copy))
        _freeze(lora.lora_A[INITIAL], layer.A0.to(device, copy=copy))
        _freeze(lora.lora_B[INITIAL], layer.B0.neg().to(device))
    wrapped.set_adapter(TRAINED)
    return wrapped


def _check_wrapped(model: nn.Module, adapter: Adapter) -> None:
    """Makes sure that PEFT, which finds layers by the ends of their names, found no others."""
    found = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if found != adapter.layers.keys():
        raise AdapterError(
            f"PEFT and the adapter disagree on {min(found ^ adapter.layers.keys())}: PEFT finds "
            "layers by the ends of their names; load the base that the adapter was made for, or "
            "attach with use_peft=False"
        )


def _freeze(linear: nn.Linear, weight: Tensor) -> None:
    """Puts a buffer in the parameter's place: nothing that makes parameters trainable reaches it.

    PEFT makes the parameters of every active adapter trainable in several places.
    """
    del linear.weight
    linear.register_buffer("weight", weight)


def adapter_of_peft(model: Any) -> Adapter:
    """The adapter that a PeftModel made by `attach_peft` carries, with its present factors.

    Raises:
        AdapterError: the model was not made by this package.
    """
    adapter = live_adapter_of_peft(model)
    return Adapter({name: layer.detach() for name, layer in adapter.layers.items()}, adapter.record)


def live_adapter_of_peft(model: Any) -> Adapter:
    """As `adapter_of_peft`, but A and B are the parameters themselves.

    Raises:
        AdapterError: see there.
    """
    if not isinstance(model, CordaPeftModel | CordaPeftModelForCausalLM):
        raise AdapterError(
            "this PeftModel was not made by corda_kernels: load its folder with load_for_training"
        )
    base = model.get_base_model()
    layers = {}
    for name, entry in model.corda_record.layers.items():
        lora = base.get_submodule(name)
        scaling, recorded = lora.scaling[TRAINED], entry["scaling"]
        layers[name] = LayerAdapter(
            lora.lora_A[TRAINED].weight,
            lora.lora_B[TRAINED].weight,
            lora.lora_A[INITIAL].weight,
            lora.lora_B[INITIAL].weight.neg(),
            # PEFT computes alpha/rank, which rounds.
            recorded if math.isclose(recorded, scaling, rel_tol=1e-6) else scaling,
        )
    return Adapter(layers, model.corda_record)


def lora_config(adapter: Adapter, *, multiple: int = 1) -> LoraConfig:
    """The LoraConfig of an adapter of `multiple` times its ranks, with the same scaling.

    Layers of another rank than the largest stand in `rank_pattern`, those of another alpha in
    `alpha_pattern`, by their full names.
    """
    record = adapter.record
    names = {name: _pattern(name, adapter.layers) for name in adapter.layers}
    alphas = {name: layer.scaling * layer.rank for name, layer in adapter.layers.items()}
    return LoraConfig(
        r=record.rank * multiple,
        lora_alpha=record.rank * multiple,
        lora_dropout=0.0,
        bias="none",
        target_modules=record.base["target_modules"],
        rank_pattern={
            names[name]: layer.rank * multiple
            for name, layer in adapter.layers.items()
            if layer.rank != record.rank
        },
        alpha_pattern={
            names[name]: alpha * multiple for name, alpha in alphas.items() if alpha != record.rank
        },
        fan_in_fan_out=record.base["fan_in_fan_out"],
        task_type=record.base["task_type"],
        base_model_name_or_path=record.base["source"],
    )


def _pattern(name: str, names: Iterable[str]) -> str:
    """What PEFT takes for this layer only: it compares the ends of names."""
    return f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in names) else name
