"""Covariances and gradients in a file: groups of layers, symmetric matrices as triangles."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corda_kernels import arguments, fields
from corda_kernels.calibration.covariance import Covariance, Gradient, Group
from corda_kernels.calibration.packed import pack_symmetric, unpack_symmetric
from corda_kernels.errors import ConfigError
from corda_kernels.files import read_checked, write_checked

# What the names of a gradient's tensors in a file begin with.
GRADIENT = "gradient"
_NUMBERS = ("tokens", "calls", "outlier_threshold")
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
    device: str | torch.device,
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
        ConfigError: the device is not there, or too small.
    """
    arguments.usable_device(device, ConfigError)
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
    except ConfigError:  # about the device
        raise
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
        ValueError: a tensor is not what it must be.
    """
    parts = ("matrix", "mean", "fisher_trace")
    found = [part for kind in parts if (part := tensors.pop(f"{prefix}.{kind}", None)) is not None]
    shapes = [tuple(part.shape) for part in found]
    d = len(found[1]) if len(shapes[1:]) == 2 and shapes[1] else 0
    if shapes != [(d * (d + 1) // 2,), (d, channels.get(name)), ()]:
        raise ValueError(f"the gradient of {name!r} is incomplete, or of another size")
    if {part.dtype for part in found} not in ({torch.float32}, {torch.float64}):
        raise ValueError(f"the gradient of {name!r} has another dtype")
    if not all(bool(part.isfinite().all()) for part in found):
        raise ValueError(f"the gradient of {name!r} holds NaN or Inf")
    return Gradient(unpack_symmetric(found[0], d), *found[1:])


def _covariance(
    record: Mapping[str, Any], index: str, tensors: dict[str, Tensor], device: str | torch.device
) -> Covariance:
    """That of one record, on `device`; its tensors are taken out of `tensors`.

    Raises:
        ValueError: a tensor is not what it must be.
        ConfigError: the device is not there, or too small.
    """
    channels = record["channels"]
    found = []
    for name, size, dtypes in (
        ("matrix", channels * (channels + 1) // 2, (torch.float32, torch.float64)),
        ("absmax", channels, (torch.float32,)),
        ("outlier_count", channels, (torch.int64,)),
    ):
        part = tensors.pop(f"{index}.{name}", None)
        if part is None or part.shape != (size,) or part.dtype not in dtypes:
            raise ValueError(f"the tensor '{index}.{name}' is missing, or of another size or dtype")
        if not bool(part.isfinite().all()) or (name != "matrix" and bool((part < 0).any())):
            raise ValueError(f"the tensor '{index}.{name}' holds NaN, Inf or negative statistics")
        found.append(part)
    try:
        matrix = unpack_symmetric(found[0], channels).to(device)
        absmax, count = (part.to(device) for part in found[1:])
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"covariances cannot be moved to device {str(device)!r}: {' '.join(str(error).split())}"
        ) from error
    tokens, calls, threshold = (record[name] for name in _NUMBERS)
    return Covariance(matrix, tokens, calls, absmax, count, float(threshold))
