"""Covariances and gradients in a file: groups of layers, symmetric matrices as triangles."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corda_kernels import fields
from corda_kernels.calibration.covariance import Covariance, Gradient, Group
from corda_kernels.calibration.packed import pack_symmetric, unpack_symmetric
from corda_kernels.files import read_checked, write_checked

# What the names of a gradient's tensors in a file begin with.
GRADIENT = "gradient"
_NUMBERS = ("tokens", "calls", "outlier_threshold")
_FLOATS = (torch.float32, torch.float64)
# What the record of a group may hold.
_GROUP_FIELDS: dict[str, fields.Check] = {
    "modules": lambda value: fields.is_names(value) and len(value) > 0,
    "channels": fields.whole(1),
    "tokens": fields.is_whole,
    "calls": fields.is_whole,
    "outlier_threshold": lambda value: fields.is_number(value, 0) or value == math.inf,
}


def write_groups(
    path: str | os.PathLike[str],
    format_: str,
    groups: Iterable[Group],
    header: Mapping[str, Any],
    gradients: Sequence[tuple[str, Gradient]] = (),
) -> None:
    """Writes covariances, each with the modules that share it, as a checked file.

    Only the lower triangle of a symmetric matrix is read. `header` gets a record of the groups, and
    of the gradients, which come with their layers' names, where there are some.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    records = []
    for index, (covariance, names) in enumerate(groups):
        tensors[f"{index}.matrix"] = pack_symmetric(covariance.matrix).cpu()
        tensors[f"{index}.absmax"] = covariance.absmax.cpu()
        tensors[f"{index}.outlier_count"] = covariance.outlier_count.cpu()
        numbers = {name: getattr(covariance, name) for name in _NUMBERS}
        records.append({"modules": names, "channels": len(covariance.matrix), **numbers})
    for index, (_, gradient) in enumerate(gradients):
        tensors[f"{GRADIENT}.{index}.matrix"] = pack_symmetric(gradient.matrix).cpu()
        tensors[f"{GRADIENT}.{index}.mean"] = gradient.mean.cpu().contiguous()
        tensors[f"{GRADIENT}.{index}.fisher_trace"] = gradient.fisher_trace.cpu().clone()
    noted = {"gradients": [name for name, _ in gradients]} if gradients else {}
    write_checked(path, format_, {"groups": records, **noted, **header}, tensors)


def read_groups(
    path: str | os.PathLike[str],
    schema: Mapping[str, fields.Check],
    device: torch.device,
    **file: Any,
) -> tuple[dict[str, Any], list[Group], list[tuple[str, Gradient]]]:
    """Reads what `write_groups` wrote: the header, the groups and the gradients.

    Args:
        path: the file.
        schema: what the header may hold besides the groups.
        device: where the covariances go.
        file: see `read_checked`.

    Raises:
        CordaError: of type `error`: the file is missing, truncated, altered, or of another kind.
    """
    header, tensors = read_checked(path, **file)
    try:
        fields.check_fields(
            header, {"groups": lambda value: isinstance(value, list), **schema}, "the header"
        )
        groups = []
        for index, record in enumerate(header["groups"]):
            fields.check_fields(record, _GROUP_FIELDS, f"group {index}")
            groups.append((_covariance(record, f"{index}", tensors, device), record["modules"]))
        channels = {name: len(part.matrix) for part, names in groups for name in names}
        gradients = [
            (name, _gradient(name, f"{GRADIENT}.{index}", tensors, channels).to(device))
            for index, name in enumerate(header.get("gradients", ()))
        ]
        if tensors:
            raise ValueError(f"it says nothing of the tensor {min(tensors)!r}")
    except ValueError as reason:
        raise file["error"](
            f"{path}: its header is not that of a {file['what']} file ({reason}): {file['remedy']}"
        ) from reason
    return header, groups, gradients


def _gradient(
    name: str, prefix: str, tensors: dict[str, Tensor], channels: Mapping[str, int]
) -> Gradient:
    """That of one layer; its tensors are taken out of `tensors`.

    Raises:
        ValueError: one of them is missing or damaged, or does not fit the layer's covariance.
    """
    what, mean = f"the gradient of {name!r}", tensors.get(f"{prefix}.mean")
    d = 0 if mean is None else mean.shape[:1].numel()
    mean = _taken(tensors, f"{prefix}.mean", what, (d, channels.get(name, 0)), *_FLOATS)
    packed = _taken(tensors, f"{prefix}.matrix", what, (d * (d + 1) // 2,), mean.dtype)
    trace = _taken(tensors, f"{prefix}.fisher_trace", what, (), mean.dtype)
    return Gradient(unpack_symmetric(packed, d), mean, trace)


def _covariance(
    record: Mapping[str, Any], index: str, tensors: dict[str, Tensor], device: torch.device
) -> Covariance:
    """That of one record, on `device`; its tensors are taken out of `tensors`.

    Raises:
        ValueError: one of them is missing or damaged.
    """
    what, d = f"the covariance of {record['modules'][0]!r}", record["channels"]
    packed = _taken(tensors, f"{index}.matrix", what, (d * (d + 1) // 2,), *_FLOATS)
    absmax = _taken(tensors, f"{index}.absmax", what, (d,), torch.float32)
    count = _taken(tensors, f"{index}.outlier_count", what, (d,), torch.int64)
    if bool((absmax < 0).any() or (count < 0).any()):
        raise ValueError(f"{what} holds negative statistics")
    tokens, calls, threshold = (record[name] for name in _NUMBERS)
    matrix, absmax, count = (
        tensor.to(device) for tensor in (unpack_symmetric(packed, d), absmax, count)
    )
    return Covariance(matrix, tokens, calls, absmax, count, float(threshold))


def _taken(
    tensors: dict[str, Tensor], key: str, what: str, shape: tuple[int, ...], *dtypes: torch.dtype
) -> Tensor:
    """One of the tensors, taken out of them; it must have this shape and one of these dtypes."""
    found = tensors.pop(key, None)
    if found is None or found.shape != shape or found.dtype not in dtypes:
        raise ValueError(f"{what} lacks the tensor {key!r}, or it has another size or dtype")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{what} holds NaN or Inf")
    return found
