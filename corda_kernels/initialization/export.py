"""Ways out: a plain LoRA on the untouched base, or the weights merged into it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.errors import OutputError
from corda_kernels.initialization.checkpoint import (
    adapter_of,
    check_adapter_folder,
    read_adapter,
    residual_marker,
    write_lora,
)
from corda_kernels.initialization.linear import CordaLinear, detach_linears
from corda_kernels.initialization.peft_model import RECORD_FILE, lora_config
from corda_kernels.linears import check_writable, linear_weight
from corda_kernels.precision import without_autocast


def export_lora(source: nn.Module | str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes what training has learnt as a plain LoRA of twice the rank, for the untouched base.

    B A − B0 A0 is the product of [B, −B0] and [A; A0], so that nothing is approximated. Stock PEFT
    and serving engines load the result as any LoRA. Of a residual that was stored in a narrow dtype
    (`residual="weight"`) the rounding stays behind: beside W the result misses it.

    Args:
        source: an adapted model, or an adapter's folder; the base is not needed.
        out: the folder to write.

    Raises:
        AdapterError: the source is no adapter, or a damaged one.
        OutputError: the folder cannot be written, or holds an adapter or a model.
    """
    adapter = adapter_of(source) if isinstance(source, nn.Module) else read_adapter(source)
    folder = check_adapter_folder(out)
    if (folder / RECORD_FILE).exists():
        raise OutputError(
            f"{folder} holds an adapter, which the export would damage: choose another folder"
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in adapter.layers.items():
        A = torch.cat([layer.A, layer.A0], 0)
        B = torch.cat([layer.B, -layer.B0], 1)
        factors[name] = (A, B)
    write_lora(folder, factors, lora_config(adapter, multiple=2))


@without_autocast()
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Folds the adapter into the weights and takes it off; the model is plain again.

    With `residual="pair"` W becomes W + (B A − B0 A0), with `residual="weight"` W' + B A, each
    computed in float32, or the base's wider dtype, as one sum and rounded once.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without. It is used up.

    Returns:
        The base model, with merged weights.

    Raises:
        AdapterError: the model carries no adapter, or a damaged one.
        TargetError: a layer is quantised.
    """
    from peft import PeftModel

    adapter = adapter_of(model)
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    wrapped: dict[str, Any] = {name: inside.get_submodule(name) for name in adapter.layers}
    check_writable(
        {
            name: module.base if isinstance(module, CordaLinear) else module.base_layer
            for name, module in wrapped.items()
        },
        "merging writes into it",
        "export a plain LoRA for it (export_lora), or attach the adapter to the base in a floating "
        "dtype and merge there",
    )
    base = model.unload() if isinstance(model, PeftModel) else detach_linears(model)
    for name, layer in adapter.layers.items():
        weight = linear_weight(base.get_submodule(name))
        change = layer.delta()
        if adapter.record.residual == "weight":
            change = change + layer.initial_product()
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide) + change.to(weight.device))
    if residual_marker(base) is not None:
        config: Any = base.config
        del config.corda_residual
    return base
