"""JSON and tensors on disk: written whole or not at all, read as they were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from corda_kernels.arguments import readable_path
from corda_kernels.errors import CordaError
from corda_kernels.fields import parse_json
from corda_kernels.outputs import AnyPath, atomic_path

# The one entry of a checked file's metadata. There is only one because safetensors writes several
# in an order that differs from run to run, and equal contents should make equal files.
_SEAL = "corda"


def write_json(path: AnyPath, value: Mapping[str, Any]) -> None:
    """Writes `value` as indented JSON, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """`value` as indented JSON in UTF-8, the contents of a file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_bytes(path: AnyPath, contents: bytes) -> None:
    """Writes a file of these contents, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(contents)


def write_tensors(
    path: AnyPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, atomically.

    Args:
        path: the file.
        tensors: contiguous tensors on any device that do not share memory.
        metadata: string metadata for the file's header.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        save_file(dict(tensors), str(temporary), metadata=dict(metadata))


def write_checked(
    path: AnyPath,
    format_: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes a safetensors file with a JSON header and a checksum over all of it, atomically.

    Equal contents make equal files, byte for byte.

    Args:
        path: the file.
        format_: name and version of what the file holds.
        header: a JSON object.
        tensors: as for `write_tensors`.

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps(header, ensure_ascii=False)
    write_tensors(path, tensors, {_SEAL: "\n".join((format_, digest(tensors, text), text))})


def read_checked(
    path: AnyPath,
    format_: str,
    *,
    what: str,
    error: type[CordaError],
    remedy: str,
    mapped: bool = False,
) -> tuple[Any, dict[str, Tensor]]:
    """Reads a file that `write_checked` wrote, and verifies its format and checksum.

    Args:
        path: the file.
        format_: which it must have.
        what: kind of file, for messages.
        error: type to raise.
        remedy: what to do about a bad file, for messages.
        mapped: whether the tensors may stay in the file, whose pages the system can drop when
            memory is short; it must be one that nobody else writes to.

    Returns:
        The JSON value of its header, and its tensors.

    Raises:
        CordaError: of type `error`: the file is missing, truncated, altered, or of another kind.
    """
    path = readable_path(path, error)
    if not path.is_file():
        raise error(f"{path}: no such {what} file")
    try:
        with safe_open(str(path), framework="pt") as file:
            seal = (file.metadata() or {}).get(_SEAL, "").split("\n", 2)
            if seal[0] != format_:
                raise error(
                    f"{path} is a safetensors file, but not a {what} file written by this package "
                    f"(format {seal[0][:40]!r}, expected {format_!r})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, tensor in () if mapped else tensors.items():
                tensors[name] = tensor.clone()
    except (SafetensorError, OSError) as reason:
        raise error(
            f"{path} is truncated or not a safetensors file ({reason}): {remedy}"
        ) from reason
    if len(seal) != 3 or digest(tensors, seal[2]) != seal[1]:
        raise error(
            f"{path}: the contents do not match their checksum; the file was altered or damaged: "
            f"{remedy}"
        )
    try:
        return parse_json(seal[2]), tensors
    except ValueError as reason:
        raise error(f"{path}: the header is not JSON ({reason}): {remedy}") from reason


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over `text` and every tensor's name, dtype, shape and bytes, ordered by name."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
