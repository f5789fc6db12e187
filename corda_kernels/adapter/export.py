"""Ways out: one plain LoRA that every engine reads alike, or the weights merged into the base."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from corda_kernels.adapter import folder
from corda_kernels.adapter.card import CARD_FILE, SERVED_RANKS, export_card
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.linear import CordaLinear, base_layer
from corda_kernels.adapter.lora import (
    FACTOR,
    base_name,
    check_finite,
    fits_residual,
    read_lora,
    write_lora,
)
from corda_kernels.adapter.model import adapter_of, check_start, live_adapter, residual_marker
from corda_kernels.adapter.published import residual
from corda_kernels.adapter.record import factor_tensors, lora_config, sizes
from corda_kernels.arguments import instance_of, whole_number
from corda_kernels.errors import (
    AdapterError,
    CordaWarning,
    ModelError,
    OutputError,
    RankError,
    warn,
)
from corda_kernels.files import write_bytes
from corda_kernels.linears import check_writable, linear_weight
from corda_kernels.outputs import staged_folder
from corda_kernels.precision import without_autocast


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote.

    Attributes:
        rank: rank of every linear layer; experts may have a smaller one.
        error: ‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius) of the layer in which a smaller rank lost most; 0 if
            nothing was cut off.
        layer: that layer's name; None if nothing was cut off.
        median: median of the layers' errors.
        total: error of all layers' ΔW together.

    """

    rank: int
    error: float = 0.0
    layer: str | None = None
    median: float = 0.0
    total: float = 0.0


def export_lora(
    source: nn.Module | str | os.PathLike[str], out: str | os.PathLike[str], rank: int | None = None
) -> LoraExport:
    """Writes what training has changed as a plain LoRA of one rank, for the untouched base.

    An adapter of uniform ranks is copied. An adapter made under a budget is padded with zeros to
    its largest rank, and its scaling is folded into B, for engines that read one rank and one
    alpha. With `residual="weight"` the change B A − B0 A0 is written as `[B, ΔB][ΔA; A0]`, of twice
    the rank, without the rounding of the residual. What a trainer saved beside the factors is kept.

    Args:
        source: an adapted model, or the folder of an adapter, also of one that another tool wrote;
            the base is not needed.
        out: folder to write.
        rank: rank to truncate every layer's B A to, by an SVD; None keeps everything.

    Returns:
        The rank that was written, and how much was lost.

    Raises:
        AdapterError: the source is no LoRA, or is damaged or diverged; or a rank is given with
            DoRA.

        RankError: the rank is not at least 1.
        OutputError: the folder cannot be written, is the source itself, or holds a model or an
            adapter with a record.
    """
    if rank is not None:
        rank = whole_number("the rank of an export", rank, 1, error=RankError)
    config, others, layers = _source(source)
    if rank is not None and config.get("use_dora"):
        raise AdapterError(
            "DoRA changes the weight by more than B·A, which therefore cannot be truncated: export "
            "it at its own rank"
        )
    target = folder.check_adapter_folder(out)
    same = not isinstance(source, nn.Module) and target.resolve() == Path(source).resolve()
    if same or any((target / own).exists() for own in (folder.RECORD_FILE, folder.INITIAL_FILE)):
        raise OutputError(
            f"{target} holds an adapter, which the export would damage: choose another folder"
        )
    changes = {name: layer.change() for name, layer in layers.items()}
    for name, change in changes.items():
        check_finite(name, change.A, change.B)
    parameters = config.get("target_parameters")
    widest = sizes(changes, parameters)["r"]
    result, note = LoraExport(widest), "Nothing was cut off."
    most = max(change.rank for change in changes.values())
    cut = rank if rank is not None and rank < most else None
    patterns = any(config.get(name) for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    if cut is not None or patterns or widest != config["r"]:
        for key in others:
            if "lora_" in key and "lora_magnitude_vector" not in key:
                raise AdapterError(
                    f"the LoRA adapts more than the weights of linear layers ({key}), and can only "
                    "be copied: export it at its own rank, without patterns"
                )
    if cut is not None:
        lost, energies = {}, {}
        for name, change in changes.items():
            rows = cut if change.A.ndim == 2 else min(cut, change.rank)
            changes[name], lost[name], energies[name] = _truncated(change, rows)
        errors = {name: _error(lost[name], energies[name]) for name in lost}
        worst = max(errors, key=errors.__getitem__)
        total = _error(sum(lost.values()), sum(energies.values()))
        result = LoraExport(cut, errors[worst], worst, median(errors.values()), total)
        note = (
            f"Cut off from rank {most}, with an error of {result.error:.2%} at most in any layer."
        )
    elif patterns:
        # Experts are left as they are: padded to the rank of linear layers they would be as many
        # times larger as a token has experts.
        changes = {
            name: _padded(change, widest if change.A.ndim == 2 else change.rank)
            for name, change in changes.items()
        }
    if result.rank > SERVED_RANKS[-1]:
        warn(
            f"the LoRA has rank {result.rank}, and vLLM serves {SERVED_RANKS[-1]} at most: give a "
            "rank to cut it off at, or merge it",
            CordaWarning,
        )
    base = base_name(config)
    config |= {
        **sizes(changes, parameters),
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": base,
    }
    with staged_folder(target, replaced=folder.ADAPTER_FILES) as staged:
        write_lora(staged, config, others | factor_tensors(changes))
        write_bytes(staged / CARD_FILE, export_card(base, result.rank, note).encode())
    return result


def _source(
    source: nn.Module | str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, LayerAdapter]]:
    """A LoRA's configuration, what is saved beside its factors, and these."""
    if not isinstance(source, nn.Module):
        found = read_lora(source)
        config, tensors, layers = found.config, found.tensors, folder.layer_adapters(found)
        if not fits_residual(config):
            # False starts elsewhere than at zero, but on the untouched base.
            check_start(config.get("init_lora_weights") or True, str(found.folder))
    elif isinstance(source, PeftModel):
        live = live_adapter(source, variants=True).layers
        layers = {name: layer.detach() for name, layer in live.items()}
        config = source.peft_config[source.active_adapter].to_dict()
        tensors = get_peft_model_state_dict(source, adapter_name=source.active_adapter)
    else:
        adapter = adapter_of(source)
        config, tensors, layers = lora_config(adapter).to_dict(), {}, adapter.layers
    others = {key: tensor for key, tensor in tensors.items() if not FACTOR.fullmatch(key)}
    return config, {key: tensor.contiguous() for key, tensor in others.items()}, layers


def _padded(change: AdapterFactors, rank: int) -> AdapterFactors:
    """The same product by factors of `rank` rows, with scaling 1."""
    missing = rank - change.rank
    A = nn.functional.pad(change.A, (0, 0, 0, missing))
    B = nn.functional.pad(change.scaling * change.B, (0, missing))
    return AdapterFactors(A, B)


@without_autocast()
@torch.no_grad()
def _truncated(change: AdapterFactors, rank: int) -> tuple[AdapterFactors, float, float]:
    """The nearest product of `rank`, with factors of equal norms; ‖ΔW − ΔW'‖² and ‖ΔW‖²."""
    left, right = torch.linalg.qr(change.B.double()), torch.linalg.qr(change.A.double().mT)
    U, S, Vh = torch.linalg.svd(change.scaling * (left.R @ right.R.mT))
    root = S[..., :rank].sqrt()
    B = left.Q @ (U[..., :rank] * root[..., None, :])
    A = (root[..., None] * Vh[..., :rank, :]) @ right.Q.mT
    lost, energy = float(S[..., rank:].square().sum()), float(S.square().sum())
    # Layers of a budget may have less than the rank.
    return _padded(AdapterFactors(A.to(change.A), B.to(change.B)), rank), lost, energy


def _error(lost: float, energy: float) -> float:
    return math.sqrt(lost / energy) if energy else 0.0


@without_autocast()
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds the adapter to the weights and removes it.

    Without PEFT each weight becomes W + s·B A, summed in float64 and rounded once. A PeftModel is
    merged by its own `merge_and_unload`.

    Args:
        model: result of `init_corda` or `load_for_training`, with PEFT or without. Do not use it
            afterwards.

    Returns:
        The base model, with merged weights.

    Raises:
        AdapterError: the model has no adapter, or a diverged one.
        ModelError: `model` is no module.
        TargetError: a layer is quantised.
    """
    instance_of("the model", model, nn.Module, ModelError)
    wrapped: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CordaLinear | LoraLayer)
    }
    if not wrapped:
        raise AdapterError("the model carries no adapter to merge")
    bases = {name: base_layer(module) for name, module in wrapped.items()}
    for name, module in wrapped.items():
        own = dict(module.named_parameters())
        adapter = [own[key] for key in own if not key.startswith(("base.", "base_layer."))]
        check_finite(name.removeprefix("base_model.model."), *adapter)
    check_writable(
        bases,
        "merging writes into it",
        "export a plain LoRA for it (export_lora), or attach the adapter to the base in a floating "
        "dtype and merge there",
    )
    if isinstance(model, PeftModel):
        base: Any = model.merge_and_unload()
    else:
        base = model
        for name, layer in wrapped.items():
            model.set_submodule(name, bases[name])
            weight = linear_weight(bases[name])
            weight.copy_(residual(weight, AdapterFactors(layer.A, layer.B, -layer.scaling)))
    if residual_marker(base) is not None:
        del base.config.corda_residual
    for note in ("corda_record", "corda_initial", "corda_config"):
        base.__dict__.pop(note, None)
    return base  # type: ignore[no-any-return]
