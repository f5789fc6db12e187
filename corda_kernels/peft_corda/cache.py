"""PEFT's cache and covariance files, each with notes beside it of how it was made.

PEFT's files hold tensors by name and nothing about where they come from; a stale one would be taken
without a word. The notes, `<file>.json`, say for which base and with which options a file was made,
and hold its checksum.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from corda_kernels import fields
from corda_kernels.adapter import (
    Adapter,
    AdapterFactors,
    AdapterRecord,
    LayerAdapter,
    describe_base,
    published_factors,
    write_adapter,
)
from corda_kernels.adapter.record import BASE_FIELDS, base_difference, target_modules
from corda_kernels.errors import AdapterError, CacheError, CompatibilityWarning, warn
from corda_kernels.files import write_json
from corda_kernels.linalg import CoSVD
from corda_kernels.linears import is_linear
from corda_kernels.outputs import atomic_path
from corda_kernels.peft_corda.observe import Observed
from corda_kernels.peft_corda.targets import Target
from corda_kernels.versions import library_versions

StrPath = str | os.PathLike[str]
Schema = Mapping[str, fields.Schema]

_FORMAT = "corda_kernels.peft/1"
# What to do about a bad file.
_REMAKE = "delete it, and it is made again"
_CHOOSE = "delete it or choose another path"
_PARTS = ("S_WC", "U_WC", "V_WC")
# PEFT keeps covariances in float16 if it is asked to.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What the notes on a cache and on covariances may say.
_NOTES: Schema = {
    "format": fields.one_of(_FORMAT),
    "sha256": fields.is_text,
    "layers": lambda value: fields.is_names(value) and len(value) > 0,
    "base": BASE_FIELDS,
    "versions": fields.is_texts,
    "normalize": fields.one_of("tokens", "peft"),
}
_OF_CACHE: Schema = {
    **_NOTES,
    "corda_method": fields.one_of("ipm", "kpm"),
    "damping": fields.maybe(fields.number(0)),
}
_OF_COVARIANCES: Schema = {
    **_NOTES,
    "counts": {"*": {"tokens": fields.is_whole, "calls": fields.is_whole}},
}


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
    factors = published_factors(weight, part)
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
        f"{name}.eigens.{part}": getattr(found, part).cpu()
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
    cached = _components(path, _load(path, _OF_CACHE, recipe, model)[0])
    eigens = {name: cached[name] for name in targets if name in cached}
    for name, found in eigens.items():
        rank, weight = targets[name].rank, targets[name].weight
        shapes = (rank,), (weight.shape[0], rank), (weight.shape[1], rank)
        for part, shape in zip(_PARTS, shapes, strict=True):
            tensor = getattr(found, part)
            if tensor.shape != shape:
                raise CacheError(
                    f"{path} holds {part} of layer {name} in shape {tuple(tensor.shape)}, but rank "
                    f"{rank} of this model asks for {shape}: {_CHOOSE}"
                )
            setattr(found, part, tensor.to(weight.device))
    return eigens


def read_components(path: StrPath) -> tuple[dict[str, CordaEigens], dict[str, Any]]:
    """All components in a cache, on the CPU, and the notes on them, empty where PEFT wrote it.

    Raises:
        CacheError: the file is damaged, or is no cache.
    """
    tensors, notes = _load(path, _OF_CACHE)
    return _components(path, tensors), notes


def _components(path: StrPath, tensors: Mapping[str, Tensor]) -> dict[str, CordaEigens]:
    """All layers' components, in copies: the file is mapped, and corda_init writes into S."""
    suffix = f".eigens.{_PARTS[0]}"
    names = [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if {f"{name}.eigens.{part}" for name in names for part in _PARTS} != tensors.keys():
        raise CacheError(f"{path} is no cache of components: choose another path")
    eigens = {}
    for name in names:
        S, U, V = (tensors[f"{name}.eigens.{part}"] for part in _PARTS)
        _check_finite(path, name, S, U, V)
        if (
            not S.ndim == U.ndim - 1 == V.ndim - 1 == 1
            or not len(S) == U.shape[1] == V.shape[1] > 0
            or bool((S < 0).any())
        ):
            raise CacheError(
                f"{path} holds parts of layer {name} that do not fit, or negative values: {_REMAKE}"
            )
        eigens[name] = CordaEigens(*(part.to(torch.float32, copy=True) for part in (S, U, V)))
    return eigens


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
    matrices = {name: covariance.matrix for name, covariance in covariances.items()}
    layers = {name: targets[name] for name in covariances}
    _write(path, matrices, model, layers, {"normalize": normalize, "counts": counts})


def read_covariances(
    path: StrPath, model: nn.Module, targets: Mapping[str, Target], normalize: str
) -> dict[str, Observed]:
    """Reads the covariances of those of the layers that the file has.

    Raises:
        CacheError: the file is damaged, was made for another base or with another `normalize`, or
            holds matrices of another size.
    """
    tensors, notes = _load(path, _OF_COVARIANCES, {"normalize": normalize}, model)
    shared: dict[int, Observed] = {}
    covariances = {}
    for name in [name for name in targets if name in tensors]:
        matrix, inputs = tensors[name], targets[name].weight.shape[1]
        if matrix.shape != (inputs, inputs):
            raise CacheError(
                f"{path} holds a covariance {tuple(matrix.shape)} for layer {name}, which has "
                f"{inputs} inputs: it belongs to another model; {_CHOOSE}"
            )
        place = matrix.data_ptr()
        if place not in shared:
            _check_finite(path, name, matrix)
            seen = notes.get("counts", {}).get(name, {"tokens": 0, "calls": 0})
            # A copy, for the file is mapped, and may be written again.
            shared[place] = Observed(matrix.to(torch.float32, copy=True), **seen)
        covariances[name] = shared[place]
    return covariances


def _check_finite(path: StrPath, name: str, *tensors: Tensor) -> None:
    broken = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
    if broken:
        raise CacheError(
            f"{path} holds {broken} NaN or Inf for layer {name} (a float16 sum may have overflowed "
            f"where it was made): {_REMAKE}"
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


def _load(
    path: StrPath,
    schema: Schema,
    wanted: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors, on the CPU, and its notes, which are empty where PEFT wrote it.

    Args:
        path: the file.
        schema: what its notes may say.
        wanted: what it must have been made with; None for whatever it is.
        model: whose it must be; None for anybody's.
    """
    notes = _read_notes(path, schema)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damage may lead the unpickler to any
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CacheError(
            f"{path} is truncated or was not written by PEFT or this package ({reason}): {_REMAKE}"
        ) from error
    # Tensors of numbers, in memory as they should be.
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and tensor.dtype in _DTYPES
        for name, tensor in tensors.items()
    ):
        raise CacheError(
            f"{path} does not hold floating-point tensors by name: choose another path"
        )
    if wanted is not None and model is not None:
        _check_notes(path, notes, wanted, model)
    return {name: tensor.detach() for name, tensor in tensors.items()}, notes


def _check_notes(
    path: StrPath, notes: Mapping[str, Any], wanted: Mapping[str, Any], model: nn.Module
) -> None:
    """Makes sure that a file was made for a model with what is wanted; warns where nobody knows."""
    if not notes:
        facts = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
        warn(
            f"{path} has no notes beside it, as PEFT writes it: it is taken as made for this model "
            f"with {facts}, which cannot be checked",
            CompatibilityWarning,
        )
        return
    for key, value in wanted.items():
        if notes[key] != value:
            raise CacheError(
                f"{path} was made with {key}={notes[key]!r}, but {value!r} is asked for: {_CHOOSE}"
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
            f" this model {detail}: {_CHOOSE}"
        )


def _read_notes(path: StrPath, schema: Schema) -> dict[str, Any]:
    beside = notes_path(path)
    if not beside.is_file():
        return {}
    try:
        notes: dict[str, Any] = fields.parse_json(beside.read_text(encoding="utf-8"))
        fields.check_fields(notes, schema)
        if "counts" in notes and notes["counts"].keys() != set(notes["layers"]):
            raise ValueError("its counts are of other layers")
    except ValueError as error:
        raise CacheError(
            f"{beside} is damaged or not of this version's format {_FORMAT!r} ({error}): delete it "
            f"together with {path}"
        ) from error
    if notes["sha256"] != _checksum(path):
        raise CacheError(
            f"{path} does not match the checksum in {beside}: one of them was altered, damaged or "
            "replaced; delete both, and they are made again"
        )
    return notes


def _checksum(path: StrPath) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_adapter(model: PeftModel, path: StrPath) -> None:
    """Writes a CorDA adapter of PEFT's making in this package's layout, fresh or trained.

    PEFT's own folder of such an adapter fits the residual W − B·A alone. On the base it does not
    load, for the components that it would be made of are gone.
    `corda_kernels.load_for_training(base, path)` attaches this one to the untouched base, and
    `export_lora(path, out)` makes a plain LoRA of it.

    Args:
        model: from `get_peft_model`, after `preprocess_corda` with a `cache_file`, which must still
            be there: it holds the initial factors.
        path: a folder.

    Raises:
        AdapterError: the model's active adapter is not CorDA's, or trains more than A and B; or its
            cache is gone, of PEFT's own making, or another layer's.
        CacheError: the cache is damaged.
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
                "lost here: save it with PEFT's save_pretrained, or train without that option"
            )
    eigens, notes = read_components(options.cache_file)
    if not notes:
        raise AdapterError(
            f"{options.cache_file} was written by PEFT, which does not note the base it belongs "
            "to: make it again with this package's preprocess_corda"
        )
    base = model.get_base_model()
    layers: dict[str, LayerAdapter] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, module in base.named_modules():
        if active not in getattr(module, "lora_A", {}):
            continue
        scaling, found = module.scaling[active], eigens.get(name)
        A, B = (p[active].weight.detach().float().cpu() for p in (module.lora_A, module.lora_B))
        if found is None or found.U_WC.shape != B.shape or found.V_WC.shape != A.T.shape:
            raise AdapterError(
                f"{options.cache_file} does not fit layer {name}: it belongs to another adapter"
            )
        root = (found.S_WC / scaling).sqrt()
        A0, B0 = (found.V_WC * root).mT.contiguous(), found.U_WC * root
        layers[name] = LayerAdapter(AdapterFactors(A, B, scaling), AdapterFactors(A0, B0, scaling))
        entries[name] = {
            "rank": len(root),
            "tokens": 0,
            "sigma_max": float(found.S_WC[0]),
            "sigma_min": float(found.S_WC[-1]),
            "residual": 0.0,
        }
    record = AdapterRecord(
        mode=notes["corda_method"],
        rank=max(layer.trained.rank for layer in layers.values()),
        hold=None,
        residual="weight",
        damping=notes["damping"],
        base=notes["base"] | {"target_modules": target_modules(base, entries)},
        calibration={},
        layers=entries,
        versions=library_versions(),
    )
    write_adapter(Adapter(layers, record), path)
