"""PEFT's cache and covariance files, each with notes beside it of how it was made.

PEFT's files hold tensors by name and nothing about where they come from; a stale one would be taken
without a word. The notes, `<file>.json`, say for which base and with which options a file was made,
and hold its checksum.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.adapter import describe_base
from corda_kernels.adapter.record import base_difference, check_base_fields
from corda_kernels.errors import CacheError, CompatibilityWarning
from corda_kernels.fields import (
    Check,
    check_fields,
    is_names,
    is_number,
    is_object,
    is_text,
    is_texts,
    is_whole,
    parse_json,
)
from corda_kernels.files import write_json
from corda_kernels.linears import is_linear
from corda_kernels.outputs import atomic_path
from corda_kernels.peft_corda.eigens import CordaEigens
from corda_kernels.peft_corda.observe import Observed
from corda_kernels.peft_corda.targets import Target
from corda_kernels.versions import library_versions

StrPath = str | os.PathLike[str]

_FORMAT = "corda_kernels.peft/1"
_PARTS = ("S_WC", "U_WC", "V_WC")
# PEFT keeps covariances in float16 if it is asked to.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What the notes on a cache and on covariances may say.
_NOTES: dict[str, Check] = {
    "format": is_text,
    "sha256": is_text,
    "layers": lambda value: is_names(value) and len(value) > 0,
    "base": is_object,
    "versions": is_texts,
    "normalize": lambda value: value in ("tokens", "peft"),
}
_OF_CACHE: dict[str, Check] = _NOTES | {
    "corda_method": lambda value: value in ("ipm", "kpm"),
    "damping": lambda value: value is None or is_number(value, 0),
}
_OF_COVARIANCES: dict[str, Check] = _NOTES | {"counts": is_object}
_COUNTS: dict[str, Check] = {"tokens": is_whole, "calls": is_whole}


def is_written(path: StrPath | None) -> bool:
    """Whether the file is there and not empty, which is when PEFT reads it."""
    return path is not None and os.path.isfile(path) and os.path.getsize(path) > 0


def notes_path(path: StrPath) -> Path:
    """The file beside `path` that says how it was made."""
    return Path(f"{os.fspath(path)}.json")


def write_cache(
    path: StrPath,
    eigens: Mapping[str, CordaEigens],
    model: nn.Module,
    targets: Mapping[str, Target],
    recipe: Mapping[str, Any],
) -> None:
    """Writes the layers' components: `<layer>.eigens.S_WC`, U_WC and V_WC.

    Args:
        path: the file.
        eigens: by layer.
        model: the base.
        targets: its layers.
        recipe: the options that a reader must have asked for as well.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {
        _key(name, part): getattr(found, part).cpu()
        for name, found in eigens.items()
        for part in _PARTS
    }
    _write(path, tensors, model, {name: targets[name] for name in eigens}, recipe)


def read_cache(
    path: StrPath, model: nn.Module, targets: Mapping[str, Target], recipe: Mapping[str, Any]
) -> dict[str, CordaEigens]:
    """Reads the components of those of the layers that the file has, onto their devices.

    Raises:
        CacheError: the file is damaged, was made for another base or with other options than
            `recipe`, or holds components of another shape or rank.
    """
    tensors, _ = _read(path, model, recipe, _OF_CACHE)
    eigens = {}
    for name, target in targets.items():
        if not all(_key(name, part) in tensors for part in _PARTS):
            continue
        outputs, inputs = target.weight.shape
        shapes = ((target.rank,), (outputs, target.rank), (inputs, target.rank))
        for part, shape in zip(_PARTS, shapes, strict=True):
            tensor = tensors[_key(name, part)]
            if tensor.shape != shape:
                raise CacheError(
                    f"{path} holds {part} of layer {name} in shape {tuple(tensor.shape)}, but rank "
                    f"{target.rank} of this model asks for {shape}: delete it or choose another "
                    "path"
                )
        eigens[name] = _components(path, name, tensors, target.weight.device)
    return eigens


def _components(
    path: StrPath, name: str, tensors: Mapping[str, Tensor], device: torch.device | str
) -> CordaEigens:
    """A layer's components, in copies: the file is mapped, and corda_init writes into S."""
    found = [tensors[_key(name, part)] for part in _PARTS]
    for tensor in found:
        _check_finite(path, name, tensor)
    S, U, V = found
    if S.ndim != 1 or U.ndim != 2 or V.ndim != 2 or not len(S) == U.shape[1] == V.shape[1] > 0:
        raise CacheError(
            f"{path} holds parts of layer {name} that do not fit each other: delete it, and it is "
            "made again"
        )
    if bool((S < 0).any()):
        raise CacheError(
            f"{path} holds negative singular values of layer {name}: delete it, and it is made "
            "again"
        )
    return CordaEigens(*(tensor.to(device, torch.float32, copy=True) for tensor in found))


def read_components(path: StrPath) -> tuple[dict[str, CordaEigens], dict[str, Any]]:
    """All components in a cache, on the CPU, and the notes on them, empty where PEFT wrote it.

    Raises:
        CacheError: the file is damaged, or is no cache.
    """
    tensors, notes = _load(path, _OF_CACHE)
    suffix = _key("", _PARTS[0])
    names = [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if {_key(name, part) for name in names for part in _PARTS} != tensors.keys():
        raise CacheError(f"{path} is no cache of components: choose another path")
    return {name: _components(path, name, tensors, "cpu") for name in names}, notes


def write_covariances(
    path: StrPath,
    covariances: Mapping[str, Observed],
    model: nn.Module,
    targets: Mapping[str, Target],
    normalize: str,
) -> None:
    """Writes the layers' matrices (in, in), undamped; those that layers share take space once.

    Raises:
        OutputError: it cannot be written.
    """
    counts = {name: {"tokens": c.tokens, "calls": c.calls} for name, c in covariances.items()}
    _write(
        path,
        {name: covariance.matrix for name, covariance in covariances.items()},
        model,
        {name: targets[name] for name in covariances},
        {"normalize": normalize, "counts": counts},
    )


def read_covariances(
    path: StrPath, model: nn.Module, targets: Mapping[str, Target], normalize: str
) -> dict[str, Observed]:
    """Reads the covariances of those of the layers that the file has.

    Raises:
        CacheError: the file is damaged, was made for another base or with another `normalize`, or
            holds matrices of another size.
    """
    tensors, notes = _read(path, model, {"normalize": normalize}, _OF_COVARIANCES)
    counts = notes.get("counts", {})
    shared: dict[int, Observed] = {}
    covariances = {}
    for name, target in targets.items():
        if name not in tensors:
            continue
        matrix, inputs = tensors[name], target.weight.shape[1]
        if matrix.shape != (inputs, inputs):
            raise CacheError(
                f"{path} holds a covariance {tuple(matrix.shape)} for layer {name}, which has "
                f"{inputs} inputs: it belongs to another model; delete it or choose another path"
            )
        place = matrix.data_ptr()
        if place not in shared:
            _check_finite(path, name, matrix)
            seen = counts.get(name, {"tokens": 0, "calls": 0})
            # A copy, for the file is mapped, and may be written again.
            copy = matrix.to(torch.float32, copy=True)
            shared[place] = Observed(copy, seen["tokens"], seen["calls"])
        covariances[name] = shared[place]
    return covariances


def _key(name: str, part: str) -> str:
    return f"{name}.eigens.{part}"


def _check_finite(path: StrPath, name: str, tensor: Tensor) -> None:
    broken = int((~torch.isfinite(tensor)).sum())
    if broken:
        raise CacheError(
            f"{path} holds {broken} NaN or Inf for layer {name} (a float16 sum may have overflowed "
            "where it was made): delete it, and it is made again"
        )


def _write(
    path: StrPath,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    targets: Mapping[str, Target],
    facts: Mapping[str, Any],
) -> None:
    with atomic_path(path) as temporary:
        torch.save(dict(tensors), temporary)
        checksum = _checksum(temporary)
    notes = {
        "format": _FORMAT,
        "sha256": checksum,
        "layers": list(targets),
        "base": describe_base(model, {name: target.module for name, target in targets.items()}),
        "versions": library_versions(),
    }
    write_json(notes_path(path), notes | dict(facts))


def _read(
    path: StrPath, model: nn.Module, wanted: Mapping[str, Any], fields: Mapping[str, Check]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `_load`, after a check that the file was made for this model with what is wanted."""
    tensors, notes = _load(path, fields)
    if notes:
        _check_notes(path, notes, wanted, model)
    else:
        facts = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
        warnings.warn(
            f"{path} has no notes beside it, as PEFT writes it: it is taken as made for this model "
            f"with {facts}, which cannot be checked",
            CompatibilityWarning,
            stacklevel=6,
        )
    return tensors, notes


def _load(path: StrPath, fields: Mapping[str, Check]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors, on the CPU, and its notes, which are empty where PEFT wrote it.

    Args:
        path: the file.
        fields: what its notes may say.
    """
    notes = _read_notes(path, fields)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damage may lead the unpickler to any
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CacheError(
            f"{path} is truncated or was not written by PEFT or this package ({reason}): delete "
            "it, and it is made again"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in tensors.items()
    ):
        raise CacheError(
            f"{path} does not hold floating-point tensors by name: choose another path"
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}, notes


def _is_plain(tensor: Any) -> bool:
    """Whether a value is a tensor of numbers, in memory as it should be."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
    )


def _check_notes(
    path: StrPath,
    notes: Mapping[str, Any],
    wanted: Mapping[str, Any],
    model: nn.Module,
) -> None:
    for key, value in wanted.items():
        if notes.get(key) != value:
            raise CacheError(
                f"{path} was made with {key}={notes.get(key)!r}, but {value!r} is asked for: "
                "delete it or choose another path"
            )
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    missing = set(notes["layers"]) - linears.keys()
    difference = missing or base_difference(
        notes["base"], {name: linears[name] for name in notes["layers"]}
    )
    if difference:
        detail = f"has other layers ({min(missing)})" if missing else f"differs by {difference:.1%}"
        raise CacheError(
            f"{path} was made for {notes['base']['source'] or 'a model without a name'}, from which"
            f" this model {detail}: delete it or choose another path"
        )


def _read_notes(path: StrPath, fields: Mapping[str, Check]) -> dict[str, Any]:
    beside = notes_path(path)
    if not beside.is_file():
        return {}
    try:
        notes = parse_json(beside.read_text(encoding="utf-8"))
        if not isinstance(notes, dict) or notes.get("format") != _FORMAT:
            raise ValueError(f"it is not of this version's format {_FORMAT!r}")
        check_fields(notes, fields)
        check_base_fields(notes["base"])
        for name, counts in notes.get("counts", {}).items():
            check_fields(counts, _COUNTS, name)
        if "counts" in notes and notes["counts"].keys() != set(notes["layers"]):
            raise ValueError("its counts are of other layers")
    except ValueError as error:
        raise CacheError(
            f"{beside} is damaged ({error}): delete it together with {path}"
        ) from error
    if notes["sha256"] != _checksum(path):
        raise CacheError(
            f"{path} does not match the checksum in {beside}: one of them was altered, damaged or "
            "replaced; delete both, and they are made again"
        )
    found: dict[str, Any] = notes
    return found


def _checksum(path: StrPath) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
