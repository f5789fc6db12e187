"""Ways out: one plain LoRA that every engine reads alike, or the weights merged into the base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from corda_kernels.adapter import lora
from corda_kernels.adapter.card import CARD_FILE, SERVED_RANKS, export_card
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.folder import (
    ADAPTER_FILES,
    INITIAL_FILE,
    RECORD_FILE,
    check_adapter_folder,
    layer_adapters,
)
from corda_kernels.adapter.linear import CordaLinear, detach_linears
from corda_kernels.adapter.model import adapter_of, check_start, factors_in, residual_marker
from corda_kernels.arguments import instance_of, readable_path, whole_number
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
        rank: of every layer.
        error: ‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius) of the layer in which a smaller rank lost most; 0 where
            nothing was cut off.
        layer: that layer's name; None where nothing was cut off.
    """

    rank: int
    error: float = 0.0
    layer: str | None = None


def export_lora(
    source: nn.Module | str | os.PathLike[str], out: str | os.PathLike[str], rank: int | None = None
) -> LoraExport:
    """Writes what training has learnt as a plain LoRA of one rank, for the untouched base.

    An adapter of uniform ranks is copied. One made under a budget is padded with zeros to its
    largest rank and its scaling folded into B, so that engines that know one rank and one alpha
    read it right. Of an adapter with `residual="weight"` the change B A − B0 A0 is written as
    [B, ΔB][ΔA; A0], of twice the rank; what the residual's own rounding took from the base stays
    behind. What a trainer has saved beside the factors is kept as it is.

    Args:
        source: an adapted model, or an adapter's folder, whoever wrote it; the base is not needed.
        out: the folder to write.
        rank: cuts every layer off at this rank, by an SVD of its B A whose singular values both
            factors share. None keeps everything.

    Returns:
        The rank that was written, and how much was lost.

    Raises:
        AdapterError: the source is no LoRA, or a damaged or diverged one; or a rank is asked for
            with DoRA.
        RankError: the rank is not at least 1.
        OutputError: the folder cannot be written, is the source itself, or holds a model or an
            adapter with a record.
    """
    if rank is not None:
        rank = whole_number("the rank of an export", rank, 1, error=RankError)
    config, others, layers = _source(source)
    if rank is not None and config.get("use_dora"):
        raise AdapterError(
            "with DoRA the product of the factors is not all that changes the weight, and cannot "
            "be cut off alone: export it at its own rank"
        )
    folder = check_adapter_folder(out)
    same = not isinstance(source, nn.Module) and folder.resolve() == Path(source).resolve()
    if same or any((folder / name).exists() for name in (RECORD_FILE, INITIAL_FILE)):
        raise OutputError(
            f"{folder} holds an adapter, which the export would damage: choose another folder"
        )
    changes = {name: layer.change() for name, layer in layers.items()}
    for name, change in changes.items():
        lora.check_finite(name, change.A, change.B)
    widest = max(change.rank for change in changes.values())
    cut = rank is not None and rank < widest
    patterns = any(config.get(name) for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    if cut or patterns or widest != config["r"]:
        _check_only_factors(others)
    result, note = LoraExport(widest), "Nothing was cut off."
    if rank is not None and cut:
        errors = {}
        for name, change in changes.items():
            changes[name], errors[name] = _truncated(change, rank)
        worst = max(errors, key=errors.__getitem__)
        result = LoraExport(rank, errors[worst], worst)
        note = (
            f"Cut off from rank {widest}, with an error of {result.error:.2%} at most in any layer."
        )
    elif patterns:
        changes = {name: _padded(change, widest) for name, change in changes.items()}
    if result.rank > SERVED_RANKS[-1]:
        warn(
            f"the LoRA has rank {result.rank}, and vLLM serves {SERVED_RANKS[-1]} at most: give a "
            "rank to cut it off at, or merge it",
            CordaWarning,
        )
    described = config | {
        "r": result.rank,
        "lora_alpha": lora.rounded(next(iter(changes.values())).scaling * result.rank),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": lora.base_name(config),
    }
    with staged_folder(folder, replaced=ADAPTER_FILES) as staged:
        lora.write_lora(staged, described, others | lora.factor_tensors(changes))
        card = export_card(described["base_model_name_or_path"], result.rank, note)
        write_bytes(staged / CARD_FILE, card.encode())
    return result


def _source(
    source: nn.Module | str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, LayerAdapter]]:
    """A LoRA's configuration, what is saved beside its factors, and these."""
    tensors: dict[str, Tensor] = {}
    if not isinstance(source, nn.Module):
        folder = readable_path(source, AdapterError)
        config, tensors = lora.read_lora(folder)
        layers = layer_adapters(config, tensors, folder)
        if not lora.fits_residual(config):
            # False starts elsewhere than at zero, but on the untouched base.
            check_start(config.get("init_lora_weights") or True, str(folder))
    elif isinstance(source, PeftModel):
        layers = {name: layer.detach() for name, layer in factors_in(source).layers.items()}
        config = source.peft_config[source.active_adapter].to_dict()
        tensors = get_peft_model_state_dict(source, adapter_name=source.active_adapter)
    else:
        adapter = adapter_of(source)
        config, layers = lora.lora_config(adapter).to_dict(), adapter.layers
    factors = {lora.factor_key(name, factor) for name in layers for factor in "AB"}
    others = {key: value.contiguous() for key, value in tensors.items() if key not in factors}
    return config, others, layers


def _check_only_factors(others: Mapping[str, Tensor]) -> None:
    """Refuses a LoRA that has other parts to be scaled and padded than A and B of linear layers."""
    for key in others:
        if "lora_" in key and "lora_magnitude_vector" not in key:
            raise AdapterError(
                f"the LoRA adapts more than the weights of linear layers ({key}), and can only be "
                "copied: export it at its own rank, without patterns"
            )


def _padded(change: AdapterFactors, rank: int) -> AdapterFactors:
    """The same product by factors of `rank` rows, with scaling 1."""
    missing = rank - change.rank
    A = nn.functional.pad(change.A, (0, 0, 0, missing))
    B = nn.functional.pad(change.scaling * change.B, (0, missing))
    return AdapterFactors(A, B)


@without_autocast()
@torch.no_grad()
def _truncated(change: AdapterFactors, rank: int) -> tuple[AdapterFactors, float]:
    """The nearest product of `rank`, with factors of equal norms, and its relative error."""
    left, right = torch.linalg.qr(change.B.double()), torch.linalg.qr(change.A.double().mT)
    U, S, Vh = torch.linalg.svd(change.scaling * (left.R @ right.R.mT))
    root = S[:rank].sqrt()
    B, A = left.Q @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ right.Q.mT
    energy = float(S.square().sum())
    error = (float(S[rank:].square().sum()) / energy) ** 0.5 if energy else 0.0
    # Layers of a budget may have less than the rank.
    return _padded(AdapterFactors(A.to(change.A), B.to(change.B)), rank), error


@without_autocast()
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Folds the adapter into the weights and takes it off; the model is plain again.

    Without PEFT each weight becomes W + s·B A, computed in float32, or the base's wider dtype, and
    rounded once. A PeftModel is merged by its own `merge_and_unload`.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without. It is used up.

    Returns:
        The base model, with merged weights.

    Raises:
        AdapterError: the model carries no adapter, or a diverged one.
        ModelError: what is given is no model.
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
    for name, module in wrapped.items():
        adapter = [
            weight
            for own, weight in module.named_parameters()
            if own.partition(".")[0] not in ("base", "base_layer")
        ]
        lora.check_finite(name.removeprefix("base_model.model."), *adapter)
    check_writable(
        {
            name: module.base if isinstance(module, CordaLinear) else module.get_base_layer()
            for name, module in wrapped.items()
        },
        "merging writes into it",
        "export a plain LoRA for it (export_lora), or attach the adapter to the base in a floating "
        "dtype and merge there",
    )
    if isinstance(model, PeftModel):
        base: Any = model.merge_and_unload()
    else:
        base = detach_linears(model)
        for name, layer in wrapped.items():
            weight = linear_weight(base.get_submodule(name))
            change = AdapterFactors(layer.A, layer.B, layer.scaling).product()
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wide) + change.to(weight.device))
    if residual_marker(base) is not None:
        del base.config.corda_residual
    for note in ("corda_record", "corda_initial"):
        base.__dict__.pop(note, None)
    return base  # type: ignore[no-any-return]
