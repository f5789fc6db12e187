"""Adapters on disk: the folder that stock PEFT reads and writes, with a record beside it.

adapter_config.json, adapter_model.safetensors    the LoRA, as PEFT lays it out
README.md                                         the model card
corda.json                                        how it was made; nothing depends on it
corda_initial.safetensors                         A0 and B0, where W − B0 A0 stands in the base
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from corda_kernels.adapter import lora
from corda_kernels.adapter.card import CARD_FILE, adapter_card
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.model import (
    adapter_of,
    attach,
    carrying,
    check_wrapped,
    prepare_base,
    record_of,
)
from corda_kernels.adapter.record import Adapter, AdapterRecord, initial_factors
from corda_kernels.arguments import flag, instance_of, readable_path
from corda_kernels.errors import AdapterError, ModelError, OutputError
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
    if not isinstance(model, PeftModel):
        write_adapter(adapter_of(model), path)
        return
    record, config = record_of(model), model.peft_config[lora.TRAINED]
    named = config.base_model_name_or_path
    with _staged(path, record, model.corda_initial) as folder:
        # The base, not its residual, is where PEFT looks up whether embeddings were resized.
        config.base_model_name_or_path = record.base["source"]
        try:
            model.save_pretrained(str(folder), selected_adapters=[lora.TRAINED])
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
    trained = {name: layer.trained for name, layer in adapter.layers.items()}
    with _staged(path, adapter.record, adapter.initial) as folder:
        config = lora.lora_config(adapter).to_dict() | {"inference_mode": True}
        lora.write_lora(folder, config, lora.factor_tensors(trained))


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
        config = lora.read_config(folder)
        if initial is not None:
            # Without their scaling, which is that of the trained ones.
            write_tensors(folder / INITIAL_FILE, lora.factor_tensors(initial), {"format": "pt"})
            # PEFT's own word for it, which it refuses to load on a base as it is.
            config["init_lora_weights"] = "corda"
            config["base_model_name_or_path"] = lora.residual_name(record.base["source"])
        lora.write_config(folder, config)
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
    if folder.is_dir():  # first, for what is no adapter at all has neither file
        _check_recorded(folder)
    return _adapter(*lora.read_lora(folder), folder)


def _check_recorded(folder: Path) -> None:
    if not (folder / RECORD_FILE).is_file():
        raise AdapterError(
            f"{folder} has no {RECORD_FILE}: it was not written by this package, or the file was "
            "left behind; copy it from the folder of the fresh adapter. PEFT does not need it: "
            "PeftModel.from_pretrained loads the folder as it is"
        )


def _adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Adapter:
    """The adapter in a folder, from what `read_lora` gave."""
    record = read_record(folder)
    layers = layer_adapters(config, tensors, folder)
    if lora.fits_residual(config) == (record.residual is None):
        raise AdapterError(f"{folder / RECORD_FILE} belongs to another adapter: copy it again")
    others = sorted(layers.keys() - record.layers.keys())
    if others:
        raise AdapterError(
            f"{folder} has factors of layer {others[0]}, of which {RECORD_FILE} does not tell: "
            f"{lora.MIXED}"
        )
    rows = 2 if record.residual is None else 1
    for name, entry in record.layers.items():
        if name not in layers or layers[name].trained.rank != rows * entry["rank"]:
            raise AdapterError(
                f"{folder} lacks factors of {entry['rank']} components for layer {name}: "
                f"{lora.MIXED}"
            )
    return Adapter({name: layers[name] for name in record.layers}, record)


def read_record(folder: Path) -> AdapterRecord:
    """How the adapter in a folder was made.

    Raises:
        AdapterError: the record is not there, or was altered.
    """
    _check_recorded(folder)
    return AdapterRecord.from_json(lora.read_json(folder / RECORD_FILE))


def layer_adapters(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, LayerAdapter]:
    """Each layer's trained factors, from what `read_lora` gave, beside its initial ones, if any.

    Raises:
        AdapterError: see `lora_layers`; or the initial factors are missing, altered, left over from
            another adapter, or of different layers or sizes.
    """
    layers, file = lora.lora_layers(config, tensors, folder), folder / INITIAL_FILE
    if file.is_file() != lora.fits_residual(config):
        raise AdapterError(
            f"{file} is left over from another adapter: delete it"
            if file.is_file()
            else f"{folder} lacks {INITIAL_FILE}, the part of the base that its adapter has taken "
            "over: copy it from the folder of the fresh adapter"
        )
    if not file.is_file():
        return {name: LayerAdapter(own) for name, own in layers.items()}
    found = lora.read_tensors(file)
    others = sorted(key for key in found if not lora.FACTOR.fullmatch(key))
    if others:
        raise AdapterError(f"{file} was altered: it holds {others[0]}; copy it again")
    initial = lora.lora_layers(config, found, folder)
    shapes = [
        {name: (part.A.shape, part.B.shape) for name, part in parts.items()}
        for parts in (layers, initial)
    ]
    for name in sorted(layers.keys() | initial.keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise AdapterError(
                f"{file} and {lora.WEIGHTS_FILE} differ in layer {name}: they belong to different "
                "adapters; copy the first from the folder of the fresh adapter"
            )
    return {name: LayerAdapter(own, initial[name]) for name, own in layers.items()}


def load_for_training(
    base_model: nn.Module, path: str | os.PathLike[str], *, use_peft: bool = True
) -> PeftModel | nn.Module:
    """Attaches an adapter from its folder, ready to train or to run.

    This is PEFT's own `PeftModel.from_pretrained(base_model, path, is_trainable=True)` after a
    check that it is the right base, where the folder has corda.json. What else PEFT finds in the
    folder, such as embeddings that were trained too, it restores. Only an adapter with
    `residual="weight"` needs this function.

    Args:
        base_model: the untouched base that the adapter was made for (or, for `residual="weight"`,
            also the one that `--save-base` stored). It is wrapped in place.
        path: a folder written by `save_adapter`, `corda-kernels init`, PEFT or Trainer.
        use_peft: False for CordaLinear layers in place of a PeftModel.

    Returns:
        A PeftModel, or `base_model` itself with its layers replaced.

    Raises:
        AdapterError: the folder is incomplete or altered, or belongs to another base.
        ModelError: the base is no model.
        TargetError: the adapter has taken a part of the weights over, and the base is quantised.
    """
    instance_of("the base", base_model, nn.Module, ModelError)
    flag("use_peft", use_peft)
    folder = readable_path(path, AdapterError)
    config, recorded = lora.read_config(folder), (folder / RECORD_FILE).is_file()
    tensors: dict[str, Tensor] = {}
    if not use_peft or recorded or (folder / lora.WEIGHTS_FILE).is_file():
        tensors = lora.read_tensors(folder / lora.WEIGHTS_FILE)  # PEFT also reads adapter_model.bin
    if not use_peft:
        others = sorted(key for key in tensors if not lora.FACTOR.fullmatch(key))
        if others:
            raise AdapterError(
                f"{folder} holds more than the factors of linear layers ({others[0]}): load it "
                "with PEFT, which restores that"
            )
        return attach(base_model, _adapter(config, tensors, folder), use_peft=False, copy=False)
    record: AdapterRecord | None = None
    layers: dict[str, LayerAdapter] = {}
    if recorded:
        adapter = _adapter(config, tensors, folder)
        record, layers = adapter.record, adapter.layers
        described, adapted = lora.lora_config(adapter).to_dict(), set(layers)
    else:
        if lora.fits_residual(config) or (folder / INITIAL_FILE).is_file():
            layers = layer_adapters(config, tensors, folder)
        described, adapted = _described(base_model, config, tensors, folder)
    prepare_base(base_model, layers, record)
    initial = initial_factors(layers)
    if initial is not None:
        # PEFT would take A0 and B0 out itself, of a base that lacks them already.
        described["init_lora_weights"] = True
    wrapped = _from_pretrained(base_model, folder, described)
    check_wrapped(base_model, adapted, alone=recorded)
    return carrying(wrapped, record, initial)


def _described(
    base_model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Any], set[str]]:
    """What a LoRA's folder says to PEFT, and the model's layers that it has tensors of.

    Names stand in place of any regular expression that selects layers.

    Raises:
        AdapterError: the folder is damaged, or was made for layers that the model does not have.
    """
    lora.check_tensors(config, tensors, folder)
    # PEFT ignores it too.
    config = {name: value for name, value in config.items() if name != "runtime_config"}
    modules = dict(base_model.named_modules())
    named = {lora.layer_of(key) for key in tensors if ".lora_" in key}
    adapted = {name for name in named if hasattr(modules.get(name), "weight")}
    selections = [config.get(name) for name in ("target_modules", "exclude_modules")]
    if not config.get("layers_pattern") and not any(
        isinstance(selection, str) and selection != "all-linear" for selection in selections
    ):
        return config, adapted
    if adapted != named or not adapted:
        raise AdapterError(
            f"{folder} selects its layers by a regular expression, which is not run when it stands "
            "in a file, and not all of its tensors are of layers of this model "
            f"({min(named - adapted, default='there are none')}): load it with "
            "PeftModel.from_pretrained if you trust it"
        )
    names = {
        "target_modules": lora.target_modules(base_model, adapted),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return config | names, adapted


def _from_pretrained(
    base_model: nn.Module, folder: Path, described: Mapping[str, Any]
) -> PeftModel:
    try:
        config = PeftConfig.from_peft_type(**described)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")  # they would start at random
            return PeftModel.from_pretrained(base_model, folder, is_trainable=True, config=config)
    except Exception as error:  # an altered configuration may lead PEFT to any
        raise AdapterError(f"PEFT cannot load {folder}: {error}") from error
