"""Adapters on disk: the folder that stock PEFT reads and writes, with a record beside it.

adapter_config.json, adapter_model.safetensors    the LoRA, as PEFT lays it out
README.md                                         the model card
corda.json                                        how it was made, by which the base is checked; it
                                                  also tells that A is frozen, and the order of the
                                                  components. PEFT does without
corda_initial.safetensors                         A0 and B0, where W − B0 A0 stands in the base
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from corda_kernels.adapter.card import CARD_FILE, adapter_card
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.lora import (
    CONFIG_FILE,
    MIXED,
    WEIGHTS_FILE,
    Lora,
    check_only_factors,
    fits_residual,
    lora_layers,
    read_json,
    read_lora,
    read_tensors,
    write_config,
    write_lora,
)
from corda_kernels.adapter.record import (
    RESIDUAL_OF,
    Adapter,
    AdapterRecord,
    factor_tensors,
    lora_config,
)
from corda_kernels.arguments import readable_path
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
_FRESH = "copy it from the folder of the fresh adapter"


def write_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes the folder of an adapter that is not attached to a model; see `save_adapter`.

    Raises:
        AdapterError: the adapter trains more than its factors (DoRA, modules_to_save), which only a
            model holds.

        OutputError: see `save_adapter`.
    """
    for option in ("use_dora", "modules_to_save"):
        if adapter.record.lora.get(option):
            raise AdapterError(
                f"an adapter with {option} is more than its factors: attach it (init_corda), and "
                "save the model with save_adapter or save_pretrained"
            )
    with staged_adapter(path, adapter.record, adapter.initial) as folder:
        config = lora_config(adapter).to_dict() | {"inference_mode": True}
        write_lora(folder, config, factor_tensors(adapter.layers))


@contextmanager
def staged_adapter(
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
        config = read_json(folder / CONFIG_FILE)
        if initial is not None:
            # Without their scaling, which is that of the trained ones.
            write_tensors(folder / INITIAL_FILE, factor_tensors(initial), {"format": "pt"})
            # PEFT's own word for it, which it refuses to load on a base as it is.
            config["init_lora_weights"] = "corda"
            config["base_model_name_or_path"] = RESIDUAL_OF + (record.base["source"] or "")
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
    record = read_record(
        readable_path(path, AdapterError)
    )  # first, for what is no adapter at all has none
    layers = layer_adapters(read_lora(path), record)
    return Adapter({name: layers[name] for name in record.layers}, record)


def read_record(folder: Path) -> AdapterRecord:
    """How the adapter in a folder was made.

    Raises:
        AdapterError: the record is not there, or was altered.
    """
    missing = (
        f"it was not written by this package, or the file was left behind; {_FRESH}. PEFT does not "
        "need it: PeftModel.from_pretrained loads the folder as it is"
    )
    return AdapterRecord.from_json(read_json(folder / RECORD_FILE, missing))


def layer_adapters(lora: Lora, record: AdapterRecord | None = None) -> dict[str, LayerAdapter]:
    """Each layer's trained factors, beside its initial ones, if any.

    Args:
        lora: the folder's contents.
        record: how it was made, if that is known.

    Raises:
        AdapterError: see `lora_layers`; or the initial factors are missing, altered, left over from
            another adapter, or of different layers or sizes; or the record is of another adapter.
    """
    trained, file = lora_layers(lora), lora.folder / INITIAL_FILE
    beside = fits_residual(lora.config)
    if record is not None:
        if beside == (record.residual is None):
            raise AdapterError(f"{lora.folder / RECORD_FILE} belongs to another adapter: {_FRESH}")
        _check_same(
            {name: factors.rank for name, factors in trained.items()},
            {name: record.rows * note.rank for name, note in record.layers.items()},
            f"{lora.folder / WEIGHTS_FILE} and {RECORD_FILE}",
        )
    if not beside:
        if file.is_file():
            raise AdapterError(f"{file} is left over from another adapter: delete it")
        return trained
    missing = f"it holds the part of the base that its adapter has taken over; {_FRESH}"
    taken = replace(lora, tensors=read_tensors(file, lora.config, missing))
    check_only_factors(taken.tensors, f"{file} was altered; {_FRESH}")
    initial = lora_layers(taken)
    start, now = (
        {name: [tuple(part.A.shape), tuple(part.B.shape)] for name, part in parts.items()}
        for parts in (initial, trained)
    )
    _check_same(start, now, f"{file} and {WEIGHTS_FILE}")
    return {name: replace(layer, initial=initial[name]) for name, layer in trained.items()}


def _check_same(one: Mapping[str, Any], other: Mapping[str, Any], files: str) -> None:
    """Refuses files that tell of different layers, or of different sizes of a layer."""
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise AdapterError(
                f"{files} differ in layer {name} ({one.get(name)} and {other.get(name)}): {MIXED}"
            )
