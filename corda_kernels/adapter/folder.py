"""Adapters on disk: the folder that stock PEFT reads and writes, with a record beside it.

adapter_config.json, adapter_model.safetensors    the LoRA, as PEFT lays it out
README.md                                         the model card
corda.json                                        how it was made; nothing depends on it
corda_initial.safetensors                         A0 and B0, where W − B0 A0 stands in the base
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from corda_kernels.adapter.adapter import Adapter, LayerAdapter
from corda_kernels.adapter.card import CARD_FILE, adapter_card
from corda_kernels.adapter.factors import AdapterFactors
from corda_kernels.adapter.live import adapter_of, record_of
from corda_kernels.adapter.lora_files import (
    FACTOR,
    TRAINED,
    WEIGHTS_FILE,
    factor_key,
    fits_residual,
    lora_layers,
    read_config,
    read_json,
    read_lora,
    read_tensors,
    residual_name,
    write_config,
    write_lora,
)
from corda_kernels.adapter.peft_model import lora_config
from corda_kernels.adapter.record import AdapterRecord
from corda_kernels.errors import AdapterError, OutputError
from corda_kernels.files import json_bytes, write_bytes, write_tensors
from corda_kernels.outputs import check_output, staged_folder

RECORD_FILE = "corda.json"
INITIAL_FILE = "corda_initial.safetensors"
# What an adapter's folder is made of, by whichever tool: none of it outlives the adapter.
ADAPTER_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.(safetensors|bin)|corda\.json|README\.md"
    r"|corda_initial\.safetensors"
)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the adapter's folder: what `save_pretrained` writes, the record and a model card.

    Args:
        model: from `init_corda` or `load_for_training`, with PEFT or without.
        path: a folder; an adapter that it holds already is replaced, other files stay.

    Raises:
        AdapterError: the model carries no adapter with a record.
        OutputError: the folder cannot be written, or holds a model.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        write_adapter(adapter_of(model), path)
        return
    record, config = record_of(model), model.peft_config[TRAINED]
    named = config.base_model_name_or_path
    with _staged(path, record, model.corda_initial) as folder:
        # The base, not its residual, is where PEFT looks up whether embeddings were resized.
        config.base_model_name_or_path = record.base["source"]
        try:
            model.save_pretrained(str(folder), selected_adapters=[TRAINED])
        finally:
            config.base_model_name_or_path = named


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
    with staged_folder(target, replaced=ADAPTER_FILES) as folder:
        yield folder
        config = read_config(folder)
        if initial is not None:
            write_initial(folder, initial)
            # PEFT's own word for it, which it refuses to load on a base as it is.
            config["init_lora_weights"] = "corda"
            config["base_model_name_or_path"] = residual_name(record.base["source"])
        write_config(folder, config)
        write_bytes(folder / CARD_FILE, adapter_card(record, config["r"]).encode())
        write_bytes(folder / RECORD_FILE, described)


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


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter's folder with its record.

    Raises:
        AdapterError: the folder is not there, incomplete or altered.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    record = read_record(folder)
    if record is None:
        raise AdapterError(
            f"{folder} has no {RECORD_FILE}: it was not written by this package, or the file was "
            "left behind; copy it from the folder of the fresh adapter. PEFT does not need it: "
            "PeftModel.from_pretrained loads the folder as it is"
        )
    layers = lora_layers(*read_lora(folder), folder)
    initial = read_initial(folder)
    if (initial is None) != (record.residual is None):
        raise AdapterError(f"{folder / RECORD_FILE} belongs to another adapter: copy it again")
    rows = 1 if initial else 2
    others = sorted(layers.keys() - record.layers.keys())
    if others:
        raise AdapterError(
            f"{folder} has factors of layer {others[0]}, of which {RECORD_FILE} does not tell: its "
            "files belong to different adapters, or were altered"
        )
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
        if own is None or part is None or own.shape != part.shape:
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
    file, config = folder / INITIAL_FILE, read_config(folder)
    if file.is_file() != fits_residual(config):
        raise AdapterError(
            f"{file} is left over from another adapter: delete it"
            if file.is_file()
            else f"{folder} lacks {INITIAL_FILE}, the part of the base that its adapter has taken "
            "over: copy it from the folder of the fresh adapter"
        )
    if not file.is_file():
        return None
    tensors = read_tensors(file, "A0 and B0")
    others = sorted(key for key in tensors if not FACTOR.fullmatch(key))
    if others:
        raise AdapterError(f"{file} was altered: it holds {others[0]}; copy it again")
    return lora_layers(config, tensors, folder)


def read_record(folder: Path) -> AdapterRecord | None:
    """How the adapter in a folder was made; None where nothing says so.

    Raises:
        AdapterError: the record was altered.
    """
    file = folder / RECORD_FILE
    return AdapterRecord.from_json(read_json(file)) if file.is_file() else None
