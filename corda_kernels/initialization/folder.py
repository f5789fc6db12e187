"""Adapters on disk: the folder that stock PEFT reads and writes, with a record beside it.

adapter_config.json, adapter_model.safetensors    the LoRA, as PEFT lays it out
README.md                                         the model card
corda.json                                        how it was made; nothing depends on it
corda_initial.safetensors                         A0 and B0, where W − B0 A0 stands in the base
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from corda_kernels.errors import AdapterError, OutputError
from corda_kernels.files import (
    check_output,
    filled_folder,
    json_bytes,
    write_bytes,
    write_tensors,
)
from corda_kernels.initialization.adapter import Adapter, LayerAdapter, initial_checksum
from corda_kernels.initialization.card import CARD_FILE, adapter_card
from corda_kernels.initialization.factors import AdapterFactors, residual
from corda_kernels.initialization.linear import attach_linears
from corda_kernels.initialization.live import adapter_of, record_of, residual_marker
from corda_kernels.initialization.peft_model import RESIDUAL_OF, TRAINED, attach_peft, lora_config
from corda_kernels.initialization.record import AdapterRecord, check_base
from corda_kernels.linears import check_writable, is_linear, linear_shape, linear_weight, unpack

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "corda.json"
INITIAL_FILE = "corda_initial.safetensors"

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the adapter's folder: what `save_pretrained` writes, the record and a model card.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without.
        path: a folder; files of an adapter that it holds already are replaced.

    Raises:
        AdapterError: the model carries no adapter with a record.
        OutputError: the folder cannot be written, or holds a model.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        write_adapter(adapter_of(model), path)
        return
    with _staged(path, record_of(model), model.corda_initial) as folder:
        # A residual has no name by which PEFT could look up whether embeddings were resized.
        embeddings: Any = "auto" if model.corda_initial is None else False
        model.save_pretrained(
            str(folder), selected_adapters=[TRAINED], save_embedding_layers=embeddings
        )


def write_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes an adapter's folder from plain data; see `save_adapter`.

    Raises:
        AdapterError: the adapter trains more than its factors (DoRA, modules_to_save), which are
            in a model only.
        OutputError: see `save_adapter`.
    """
    for option in ("use_dora", "modules_to_save"):
        if adapter.record.lora.get(option):
            raise AdapterError(
                f"an adapter with {option} is more than its factors: attach it (init_corda), and "
                "save the model with save_adapter or save_pretrained"
            )
    with _staged(path, adapter.record, adapter.initial) as folder:
        tensors = {}
        for name, layer in adapter.layers.items():
            tensors[factor_key(name, "A")] = layer.A
            tensors[factor_key(name, "B")] = layer.B
        write_lora(folder, lora_config(adapter).to_dict() | {"inference_mode": True}, tensors)


@contextmanager
def _staged(
    path: str | os.PathLike[str],
    record: AdapterRecord,
    initial: Mapping[str, AdapterFactors] | None,
) -> Iterator[Path]:
    """A folder to put a LoRA's files into; they go to `path` with what stands beside them."""
    target = check_adapter_folder(path)
    # First of all: a record that cannot be written must not cost the adapter that stands there.
    described = json_bytes(record.to_json())
    with filled_folder(target, last=CONFIG_FILE) as folder:
        yield folder
        config = read_config(folder)
        if initial is not None:
            write_initial(folder, initial)
            # PEFT's own word for it, which it refuses to load on a base as it is.
            config["init_lora_weights"] = "corda"
        write_config(folder, config)
        write_bytes(folder / CARD_FILE, adapter_card(record, config["r"]).encode())
        write_bytes(folder / RECORD_FILE, described)
        if initial is None:
            (target / INITIAL_FILE).unlink(missing_ok=True)


def check_adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Makes sure that an adapter can be written into a folder.

    Raises:
        OutputError: it cannot, or holds a model: transformers would load that with the adapter.
    """
    folder = check_output(path, folder=True)
    if (folder / "config.json").exists():
        raise OutputError(
            f"{folder} holds a model, which would be loaded with the adapter on it from then on: "
            "choose another folder"
        )
    return folder


def factor_key(name: str, factor: str) -> str:
    """PEFT's name for a layer's A or B in a file."""
    return f"base_model.model.{name}.lora_{factor}.weight"


def write_lora(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a LoRA in PEFT's layout."""
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS_FILE, contiguous, {"format": "pt"})
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes a LoRA's configuration in one order, so that equal ones make equal files."""
    described = dict(config)
    if isinstance(config.get("target_modules"), list):
        described["target_modules"] = sorted(config["target_modules"])
    # PEFT holds some lists of names as sets.
    text = json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False, default=sorted)
    write_bytes(folder / CONFIG_FILE, f"{text}\n".encode())


def read_lora(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and all tensors of a LoRA's folder, whoever wrote it.

    Raises:
        AdapterError: the folder is not there, incomplete or altered.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    return read_config(folder), _read_tensors(folder / WEIGHTS_FILE, "the trained factors")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, a LoRA's.

    Raises:
        AdapterError: it is missing, altered, or of another kind of adapter.
    """
    config = _read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} holds no LoRA, but {config.get('peft_type')!r}")
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [targets or ""]
    sound = {
        "r": _is_positive(config.get("r")),
        "lora_alpha": _is_positive(config.get("lora_alpha")),
        "rank_pattern": _is_pattern(config.get("rank_pattern")),
        "alpha_pattern": _is_pattern(config.get("alpha_pattern")),
        "target_modules": all(isinstance(name, str) for name in names),
    }
    for name, as_it_must in sound.items():
        if not as_it_must:
            found = repr(config.get(name))[:60]
            raise AdapterError(f"{folder / CONFIG_FILE} was altered: {name} is {found}")
    return config


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _is_pattern(value: Any) -> bool:
    """Whether a value says of layers, by regular expressions, how large something is."""
    if value is None:
        return True
    try:
        return all(re.compile(key) and _is_positive(size) for key, size in value.items())
    except (AttributeError, TypeError, re.error):
        return False


def lora_layers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, AdapterFactors]:
    """A, B and scaling of each layer, from what `read_lora` gave.

    Raises:
        AdapterError: a layer lacks a factor, or they do not fit each other.
    """
    from peft.utils.other import get_pattern_key

    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = tensor
    layers = {}
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    for name, pair in found.items():
        A, B = pair.get("A"), pair.get("B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"{folder} lacks a factor of layer {name}, or its A and B do not fit each other: "
                "its files belong to different adapters, or were altered"
            )
        alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
        rank = ranks.get(get_pattern_key(ranks, name), config["r"])
        if A.shape[0] != rank:
            raise AdapterError(
                f"layer {name} in {folder} has rank {A.shape[0]}, but {CONFIG_FILE} says {rank}: "
                "its files belong to different adapters, or were altered"
            )
        layers[name] = AdapterFactors(
            A, B, alpha / (rank**0.5 if config.get("use_rslora") else rank)
        )
    if not layers:
        raise AdapterError(f"{folder / WEIGHTS_FILE} holds no factors of a LoRA's linear layers")
    return layers


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter's folder with its record.

    Raises:
        AdapterError: the folder is not there, incomplete or altered.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    record = _read_record(folder)
    if record is None:
        raise AdapterError(
            f"{folder} has no {RECORD_FILE}: it was not written by this package, or the file was "
            "left behind; copy it from the folder of the fresh adapter. PEFT needs it not: "
            "PeftModel.from_pretrained loads the folder as it is"
        )
    layers = lora_layers(*read_lora(folder), folder)
    initial = read_initial(folder)
    if (initial is None) != (record.residual is None):
        raise AdapterError(f"{folder / RECORD_FILE} belongs to another adapter: copy it again")
    rows = 1 if initial else 2
    for name, entry in record.layers.items():
        if name not in layers or layers[name].rank != rows * entry["rank"]:
            raise AdapterError(
                f"{folder} lacks factors of {entry['rank']} components for layer {name}: its "
                "files belong to different adapters, or were altered"
            )
    found = with_initial({name: layers[name] for name in record.layers}, initial, folder)
    return Adapter(found, record)


def with_initial(
    layers: Mapping[str, AdapterFactors],
    initial: Mapping[str, AdapterFactors] | None,
    folder: Path,
) -> dict[str, LayerAdapter]:
    """Each layer's trained factors beside its initial ones, if there are any.

    Raises:
        AdapterError: they are of different layers or sizes.
    """
    if initial is None:
        return {name: LayerAdapter(own) for name, own in layers.items()}
    for name in sorted(layers.keys() | initial.keys()):
        own, part = layers.get(name), initial.get(name)
        if (
            own is None
            or part is None
            or (own.A.shape, own.B.shape)
            != (
                part.A.shape,
                part.B.shape,
            )
        ):
            raise AdapterError(
                f"{folder / INITIAL_FILE} and {WEIGHTS_FILE} differ in layer {name}: they belong "
                "to different adapters; copy the first from the folder of the fresh adapter"
            )
    return {name: LayerAdapter(own, initial[name]) for name, own in layers.items()}


def write_initial(folder: Path, initial: Mapping[str, AdapterFactors]) -> None:
    """Writes A0 and B0 of each layer; their scaling is that of the trained ones."""
    tensors = {}
    for name, factors in initial.items():
        tensors[factor_key(name, "A")] = factors.A.contiguous()
        tensors[factor_key(name, "B")] = factors.B.contiguous()
    write_tensors(folder / INITIAL_FILE, tensors, {"format": "pt"})


def read_initial(folder: Path) -> dict[str, AdapterFactors] | None:
    """What the adapter in a folder has taken out of its base; None if it is a plain LoRA.

    Raises:
        AdapterError: it is missing or altered.
    """
    file = folder / INITIAL_FILE
    if not file.is_file():
        if str(read_config(folder).get("base_model_name_or_path")).startswith(RESIDUAL_OF):
            raise AdapterError(
                f"{folder} lacks {INITIAL_FILE}, the part of the base that its adapter has taken "
                "over: copy it from the folder of the fresh adapter"
            )
        return None
    return lora_layers(read_config(folder), _read_tensors(file, "A0 and B0"), folder)


def load_for_training(
    base_model: nn.Module, path: str | os.PathLike[str], *, use_peft: bool = True
) -> PeftModel | nn.Module:
    """Attaches an adapter from its folder, ready to train or to run.

    This is PEFT's own `PeftModel.from_pretrained(base_model, path, is_trainable=True)` after a
    check that it is the right base. What else PEFT finds in the folder, such as embeddings that
    were trained too, it restores. Only an adapter with `residual="weight"` needs this function.

    Args:
        base_model: the untouched base that the adapter was made for (or, for `residual="weight"`,
            also the one that `--save-base` stored). It is wrapped in place.
        path: a folder written by `save_adapter`, `corda-kernels init`, PEFT or Trainer.
        use_peft: False for CordaLinear layers in place of a PeftModel.

    Returns:
        A PeftModel, or `base_model` itself with its layers replaced.

    Raises:
        AdapterError: the folder is incomplete or altered, or belongs to another base.
        TargetError: the adapter has taken a part of the weights over, and the base is quantised.
    """
    folder = Path(path)
    if not use_peft:
        _check_factors_only(folder)
        return attach(base_model, read_adapter(folder), use_peft=False, copy=False)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    record, initial = _read_record(folder), read_initial(folder)
    layers: dict[str, LayerAdapter] = {}
    if record is not None:
        layers = read_adapter(folder).layers
    elif initial is not None:
        layers = with_initial(lora_layers(*read_lora(folder), folder), initial, folder)
    _check_fits(base_model, layers, record)
    _take_out(base_model, initial)
    # PEFT would take A0 and B0 out itself, of a base that lacks them already.
    changes = {} if initial is None else {"init_lora_weights": True}
    wrapped = _from_pretrained(base_model, folder, changes)
    return _carry(wrapped, record, initial)


def _check_factors_only(folder: Path) -> None:
    """Refuses folders of which only PEFT restores everything."""
    others = sorted(key for key in read_lora(folder)[1] if not _FACTOR.fullmatch(key))
    if others:
        raise AdapterError(
            f"{folder} holds more than the factors of linear layers ({others[0]}): load it with "
            "PEFT, which restores that"
        )


def _from_pretrained(base_model: nn.Module, folder: Path, changes: Mapping[str, Any]) -> PeftModel:
    from peft import PeftConfig, PeftModel

    try:
        described = PeftConfig.from_json_file(str(folder / CONFIG_FILE))
        config = PeftConfig.from_peft_type(**described | changes)
        return PeftModel.from_pretrained(base_model, folder, is_trainable=True, config=config)
    except Exception as error:  # an altered configuration may lead PEFT to any
        raise AdapterError(f"PEFT cannot load {folder}: {error}") from error


def attach(
    base_model: nn.Module, adapter: Adapter, *, use_peft: bool = True, copy: bool = True
) -> PeftModel | nn.Module:
    """Attaches `adapter` to its base, in place; see `load_for_training`.

    With `copy=False` the model may take over the adapter's tensors, which training then changes.
    """
    _check_fits(base_model, adapter.layers, adapter.record)
    _take_out(base_model, adapter.initial)
    attach_to = attach_peft if use_peft else attach_linears
    wrapped = attach_to(base_model, adapter, copy=copy)
    return _carry(wrapped, adapter.record, adapter.initial)


def _carry(
    model: nn.Module, record: AdapterRecord | None, initial: dict[str, AdapterFactors] | None
) -> nn.Module:
    """Notes on a model how its adapter was made, and what it has taken out of the base."""
    carrier: Any = model
    carrier.corda_record = record
    carrier.corda_initial = initial
    return model


def _check_fits(
    base_model: nn.Module, layers: Mapping[str, LayerAdapter], record: AdapterRecord | None
) -> None:
    """Makes sure that layers belong to this base, whose weights can be trained on.

    Without a record it is only by their names and shapes.

    Raises:
        AdapterError: they do not.
    """
    base = "its base" if record is None else record.base_name
    linears = {name: module for name, module in base_model.named_modules() if is_linear(module)}
    missing = layers.keys() - linears.keys()
    if missing:
        raise AdapterError(
            f"the model has no linear layer {min(missing)}, which the adapter is for: load the base"
            f" it was made for, {base}, without another adapter"
        )
    modules = {name: linears[name] for name in layers}
    for name, layer in layers.items():
        shape = linear_shape(modules[name])
        if shape != (layer.B.shape[0], layer.A.shape[1]):
            raise AdapterError(
                f"layer {name} is {shape[0]} × {shape[1]}, but the adapter is for "
                f"{layer.B.shape[0]} × {layer.A.shape[1]}: load {base}"
            )
    check_at_hand(modules)
    unpack(modules)
    if record is not None and residual_marker(base_model) is None:
        check_base(record, modules)


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


def _take_out(base_model: nn.Module, initial: dict[str, AdapterFactors] | None) -> None:
    """Makes a base the residual of an adapter that has initial factors, unless it is that already.

    Raises:
        AdapterError: it is the residual of another one.
    """
    marker = residual_marker(base_model)
    if marker is None:
        if initial is not None:
            subtract_initial(base_model, initial)
    elif initial is None or marker != initial_checksum(initial):
        raise AdapterError(
            "this model is the residual of another adapter: load the untouched base, or the base "
            "that was saved with this adapter"
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


def _read_record(folder: Path) -> AdapterRecord | None:
    file = folder / RECORD_FILE
    return AdapterRecord.from_json(_read_json(file)) if file.is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{file} is missing: copy it from where it was made") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file} was altered: it holds no object")
    return value


def _read_tensors(file: Path, what: str) -> dict[str, Tensor]:
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        raise AdapterError(
            f"{pickled} is not read here: load the folder with PeftModel.from_pretrained and save "
            "it again, which writes safetensors"
            if pickled.is_file()
            else f"{file} is missing: it holds {what}; copy it from where it was made"
        )
    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is truncated or not a safetensors file ({error}): copy it again"
        ) from error
