"""PEFT's cache and covariance files, each with notes beside it of how it was made.

PEFT's files hold tensors by name and nothing about where they come from; a stale one would be taken
without a word. The notes, `<file>.json`, say for which base and with which options a file was made,
and hold its checksum.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from corda_kernels import adapter, fields
from corda_kernels.adapter.base import BASE_FIELDS, base_difference, describe_base, target_modules
from corda_kernels.adapter.record import LayerNote
from corda_kernels.errors import AdapterError, CacheError, CompatibilityWarning, warn
from corda_kernels.files import write_json
from corda_kernels.linalg import CoSVD
from corda_kernels.linears import linear_layers
from corda_kernels.outputs import atomic_path
from corda_kernels.peft_corda.targets import Target
from corda_kernels.versions import library_versions

StrPath = str | os.PathLike[str]
Facts = Mapping[str, Any]

_FORMAT = "corda_kernels.peft/1"
# What to do about a bad file.
_REMAKE = "delete it, and it is made again"
_CHOOSE = "delete it or choose another path"
# PEFT keeps covariances in float16 if it is asked to.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What the notes may say: the last field is of covariances, the two before it are of a cache.
_NOTES: Mapping[str, fields.Schema] = {
    "format": fields.one_of(_FORMAT),
    "sha256": fields.is_text,
    "layers": lambda value: fields.is_names(value) and len(value) > 0,
    "base": BASE_FIELDS,
    "normalize": fields.one_of("tokens", "peft"),
    "corda_method?": fields.one_of("ipm", "kpm"),
    "damping?": fields.maybe(fields.number(0)),
    "calls?": {"*": fields.is_whole},
}


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen of one layer's inputs.

    Attributes:
        matrix: C (in, in) float32, or float64 for such inputs; the mean over tokens, or over calls
            for normalize "peft".
        calls: forward calls of the layer.
    """

    matrix: Tensor
    calls: int


@dataclass(eq=False)
class CordaEigens:
    """One layer's components, as PEFT names them; it makes B = U√S and A = √S Vᵀ of them.

    Attributes:
        S_WC: (r,) float32, descending.
        U_WC: (out, r) float32.
        V_WC: (in, r) float32, V multiplied by C⁻¹.
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def corda_eigens(weight: Tensor, part: CoSVD) -> CordaEigens:
    """PEFT's form of a decomposition, with its inverse of C taken from C⁻¹V = WᵀUΣ⁻¹.

    Every number is finite, whatever C is: where σ vanishes, `published_factors` says what stands in
    for it. The tensors are new, for `corda_init` divides S in place.

    Args:
        weight: (out, in), any floating dtype.
        part: its decomposition, U (out, r).
    """
    factors = adapter.published_factors(weight, part)
    beta = factors.B.norm(dim=0)
    order = beta.argsort(descending=True, stable=True)
    S = beta[order].square()
    U = part.U[:, order]
    V = (factors.A[order] / beta[order, None]).mT
    return CordaEigens(S.float(), U.float().contiguous(), V.float().contiguous())


def is_written(path: StrPath | None) -> bool:
    """Whether the file is there and not empty, which is when PEFT reads it."""
    return path is not None and os.path.isfile(path) and os.path.getsize(path) > 0


def notes_path(path: StrPath) -> Path:
    """The file beside `path` that says how it was made."""
    return Path(f"{os.fspath(path)}.json")


def write_cache(
    path: StrPath, eigens: Mapping[str, CordaEigens], model: nn.Module, recipe: Facts
) -> None:
    """Writes the components of a model's layers: `<layer>.eigens.S_WC`, U_WC and V_WC.

    Args:
        path: the file.
        eigens: by layer.
        model: the base.
        recipe: the options that a reader must have asked for as well.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {
        f"{name}.eigens.{part}": tensor.cpu()
        for name, found in eigens.items()
        for part, tensor in vars(found).items()
    }
    _write(path, tensors, model, eigens, recipe)


def write_covariances(
    path: StrPath, covariances: Mapping[str, Observed], model: nn.Module, normalize: str
) -> None:
    """Writes the layers' matrices (in, in), undamped; those that layers share take space once.

    Raises:
        OutputError: it cannot be written.
    """
    matrices = {name: covariance.matrix for name, covariance in covariances.items()}
    calls = {name: covariance.calls for name, covariance in covariances.items()}
    _write(path, matrices, model, covariances, {"normalize": normalize, "calls": calls})


def _write(
    path: StrPath, tensors: dict[str, Tensor], model: nn.Module, layers: Iterable[str], facts: Facts
) -> None:
    with atomic_path(path) as temporary:
        torch.save(tensors, temporary)
        checksum = _checksum(temporary)
    modules = {name: model.get_submodule(name) for name in layers}
    notes = {
        "format": _FORMAT,
        "sha256": checksum,
        "layers": list(modules),
        "base": describe_base(model, modules),
    }
    write_json(notes_path(path), notes | dict(facts))


def read_cache(
    path: StrPath, targets: Mapping[str, Target], recipe: Facts, model: nn.Module | None
) -> tuple[dict[str, CordaEigens], dict[str, Any]]:
    """Reads the components of those of the layers that the file has, onto their devices.

    Args:
        path: the file.
        targets: the layers.
        recipe: options that it must have been made with.
        model: the base that it must have been made for; None for any, and with any options.

    Returns:
        The components, and the notes on them, empty where PEFT wrote the file.

    Raises:
        CacheError: the file is damaged, was made for another base or with other options than
            `recipe`, or holds components of another shape or rank.
    """
    tensors, notes = _load(path, recipe, model)
    eigens = {}
    for name, target in targets.items():
        if f"{name}.eigens.S_WC" in tensors:
            rank, (outputs, inputs) = target.rank, target.weight.shape
            shapes = {"S_WC": (rank,), "U_WC": (outputs, rank), "V_WC": (inputs, rank)}
            parts = {
                part: _copied(path, tensors, f"{name}.eigens.{part}", shape)
                for part, shape in shapes.items()
            }
            if bool((parts["S_WC"] < 0).any()):
                raise CacheError(f"{path} holds negative values in S_WC of {name}: {_REMAKE}")
            on_device = {part: tensor.to(target.weight.device) for part, tensor in parts.items()}
            eigens[name] = CordaEigens(**on_device)
    return eigens, notes


def read_covariances(
    path: StrPath, targets: Mapping[str, Target], normalize: str, model: nn.Module
) -> dict[str, Observed]:
    """Reads the covariances of those of the layers that the file has.

    Raises:
        CacheError: the file is damaged, was made for another base or with another `normalize`, or
            holds matrices of another size.
    """
    tensors, notes = _load(path, {"normalize": normalize}, model)
    shared: dict[tuple[int, torch.Size], Tensor] = {}
    covariances = {}
    for name in [name for name in targets if name in tensors]:
        inputs = targets[name].weight.shape[1]
        place = tensors[name].data_ptr(), tensors[name].shape
        if place not in shared:
            shared[place] = _copied(path, tensors, name, (inputs, inputs))
        covariances[name] = Observed(shared[place], notes.get("calls", {}).get(name, 0))
    return covariances


def _copied(
    path: StrPath, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
) -> Tensor:
    """A tensor in float32; a copy, for the file is mapped, and corda_init writes into S."""
    tensor = tensors.get(name, torch.empty(0))
    if tensor.shape != shape:
        raise CacheError(
            f"{path} holds {name} in shape {tuple(tensor.shape)}, but this model and its rank ask "
            f"for {shape}: {_CHOOSE}"
        )
    broken = int((~torch.isfinite(tensor)).sum())
    if broken:
        raise CacheError(
            f"{path} holds {broken} NaN or Inf in {name} (a float16 sum may have overflowed where "
            f"it was made): {_REMAKE}"
        )
    return tensor.detach().to(torch.float32, copy=True)


def _load(
    path: StrPath, wanted: Facts, model: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors, on the CPU, and its notes, which are empty where PEFT wrote it."""
    notes = _read_notes(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Tensors of numbers, in memory as they should be.
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str)
            and isinstance(tensor, Tensor)
            and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
            and tensor.dtype in _DTYPES
            for name, tensor in tensors.items()
        ):
            raise TypeError("it does not hold floating-point tensors by name")
    except Exception as error:  # damage may lead the unpickler to any
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CacheError(
            f"{path} is truncated or was not written by PEFT or this package ({reason}): {_REMAKE}"
        ) from error
    if model is not None:
        _check_notes(path, notes, wanted, model)
    return tensors, notes


def _read_notes(path: StrPath) -> dict[str, Any]:
    beside = notes_path(path)
    if not beside.is_file():
        return {}
    try:
        notes: dict[str, Any] = fields.parse_json(beside.read_text(encoding="utf-8"))
        fields.check_fields(notes, _NOTES)
        if notes["sha256"] != _checksum(path):
            raise ValueError("the file does not match the checksum in it")
    except ValueError as error:
        raise CacheError(
            f"{beside} is damaged, of another format than {_FORMAT!r}, or not of {path} ({error}): "
            "delete both, and they are made again"
        ) from error
    return notes


def _check_notes(path: StrPath, notes: Facts, wanted: Facts, model: nn.Module) -> None:
    """Makes sure that a file was made for a model with what is wanted; warns where nobody knows."""
    if not notes:
        facts = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
        warn(
            f"{path} has no notes beside it, as PEFT writes it: it is taken as made for this model "
            f"with {facts}, which cannot be checked",
            CompatibilityWarning,
        )
        return
    wrong = [
        f"with {key}={notes.get(key)!r}, but {value!r} is asked for"
        for key, value in wanted.items()
        if key not in notes or notes[key] != value
    ]
    linears = linear_layers(model)
    missing = set(notes["layers"]) - linears.keys()
    if missing:
        wrong.append(f"for other layers ({min(missing)})")
    elif off := base_difference(notes["base"], {name: linears[name] for name in notes["layers"]}):
        wrong.append(f"for {notes['base']['source']}, from which this model differs by {off:.1%}")
    if wrong:
        raise CacheError(f"{path} was made {wrong[0]}: {_CHOOSE}")


def _checksum(path: StrPath) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_adapter(model: PeftModel, path: StrPath) -> None:
    """Writes an adapter that PEFT made by CorDA, fresh or trained, in this package's layout.

    The folder that PEFT writes fits only the residual W − B·A, and does not load on the base.
    `corda_kernels.load_for_training(base, path)` attaches this one to the untouched base, and
    `export_lora(path, out)` makes a plain LoRA of it.

    Args:
        model: result of `get_peft_model`, after `preprocess_corda` with a `cache_file`. That file
            must still exist, because it holds the initial factors.
        path: folder to write.

    Raises:
        AdapterError: the model's active adapter is not CorDA's, or trains more than A and B; or its
            cache is missing, was written by PEFT's own function, or lacks a layer.

        CacheError: the cache is damaged, or holds components of other shapes.
        OutputError: the folder cannot be written.
    """
    active = model.active_adapter
    config = model.peft_config[active]
    options = getattr(config, "corda_config", None)
    if options is None or not is_written(options.cache_file):
        raise AdapterError(
            f"adapter {active!r} has no CorDA cache file to take its initial factors from: set "
            "CordaConfig(cache_file=…) before preprocess_corda, and keep the file"
        )
    for option in ("use_dora", "modules_to_save", "trainable_token_indices", "bias"):
        value = getattr(config, option, None)
        if value and value != "none":
            raise AdapterError(
                f"adapter {active!r} trains more than A and B ({option}={value!r}), which would be "
                "lost here: save it with PEFT's save_pretrained"
            )
    base = model.get_base_model()
    loras = {n: m for n, m in base.named_modules() if active in getattr(m, "lora_A", ())}
    targets = {name: Target(lora.get_base_layer(), lora.r[active]) for name, lora in loras.items()}
    eigens, notes = read_cache(options.cache_file, targets, {}, None)
    noted = {"corda_method", "damping"} <= notes.keys()
    if not noted or eigens.keys() != targets.keys():
        why = "belongs to another adapter" if noted else "was written by PEFT, without its base"
        raise AdapterError(
            f"{options.cache_file} {why}: make it again with this package's preprocess_corda"
        )
    layers: dict[str, adapter.LayerAdapter] = {}
    entries: dict[str, LayerNote] = {}
    for name, lora in loras.items():
        scaling, S = lora.scaling[active], eigens[name].S_WC
        A, B = (p[active].weight.detach().float() for p in (lora.lora_A, lora.lora_B))
        root = (S / scaling).sqrt()
        A0, B0 = (eigens[name].V_WC * root).mT.contiguous(), eigens[name].U_WC * root
        initial = adapter.AdapterFactors(A0, B0, scaling)
        layers[name] = adapter.LayerAdapter(A, B, scaling, initial)
        entries[name] = LayerNote.of(S)
    record = adapter.AdapterRecord(
        mode=notes["corda_method"],
        rank=max(layer.rank for layer in layers.values()),
        hold=None,
        residual="weight",
        damping=notes["damping"],
        base=notes["base"] | {"target_modules": target_modules(base, entries)},
        calibration={},
        layers=entries,
        versions=library_versions(),
    )
    adapter.write_adapter(adapter.Adapter(layers, record), path)
