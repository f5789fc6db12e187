"""Damage to files, field by field: what every reader has to end in an error of ours, or survive."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from corda_kernels.files import digest

# What stands for a field's value, as JSON text: of other kinds, odd sizes, and hostile.
_TEXTS = (
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "NaN",
    "Infinity",
    "1e400",
    f"1{'0' * 400}",
    '""',
    r'"x\u001b[2J"',
    r'"\ud800"',
    '"(([a-z0-9_.])*)*X"',
    "[]",
    "{}",
    "[" * 20_000,
    "[" * 80 + "]" * 80,
)
_HERE = "@here@"


def damaged_json(value: Any) -> Iterator[tuple[str, str]]:
    """Each field's path, and the JSON text with another value there, without it, or with it twice.

    The first entry of a list, or of an object by layers, stands for all.
    """
    for path, kept in _paths(value):
        last = path[-1]
        name = ".".join(map(str, path))
        marked = json.dumps(_changed(value, path, _HERE))
        for text in _TEXTS:
            if text == json.dumps(kept):
                continue
            yield name, marked.replace(f'"{_HERE}"', text)
        yield name, json.dumps(_changed(value, path, None, gone=True))
        if isinstance(last, str):
            field = f"{json.dumps(last)}: "
            twice = marked.replace(f'{field}"{_HERE}"', f"{field}1, {field}2")
            assert twice != marked
            yield name, twice


def _paths(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict):
        layers = [name for name in value if "." in name]
        entries: list[tuple[str | int, Any]] = [
            (name, entry) for name, entry in value.items() if name not in layers[1:]
        ]
    else:
        entries = list(enumerate(value))[:1] if isinstance(value, list) else []
    for name, entry in entries:
        yield (name,), entry
        for path, kept in _paths(entry):
            yield (name, *path), kept


def _changed(value: Any, path: tuple[str | int, ...], new: Any, *, gone: bool = False) -> Any:
    first, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[first] = _changed(value[first], tuple(rest), new, gone=gone)
    elif gone:
        del copy[first]
    else:
        copy[first] = new
    return copy


def damaged_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each tensor in other dtypes and shapes, with what is no number, missing, and one too many."""
    for name, tensor in tensors.items():
        numbers = tensor.clone() if tensor.is_floating_point() else tensor.double()
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64):
            if dtype != tensor.dtype:
                yield f"{name} {dtype}", {**tensors, name: tensor.to(dtype)}
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = numbers.clone()
            broken.view(-1)[-1] = value
            yield f"{name} {value}", {**tensors, name: broken}
        for shape in ((0,), (1, *tensor.shape), (*tensor.shape, 1), (tensor.numel() + 1,), ()):
            other = torch.ones(shape, dtype=tensor.dtype)
            yield f"{name} {shape}", {**tensors, name: other}
        if tensor.ndim == 2:
            flat, *_ = tensor.shape
            yield f"{name} empty", {**tensors, name: tensor[:0].clone()}
            yield f"{name} narrow", {**tensors, name: tensor[:, :0].clone()}
            yield f"{name} shorter", {**tensors, name: tensor[: flat - 1].clone()}
            yield f"{name} turned", {**tensors, name: tensor.mT.contiguous()}
        yield f"{name} gone", {key: kept for key, kept in tensors.items() if key != name}
        yield (
            f"{name} elsewhere",
            {f"{key}x" if key == name else key: kept for key, kept in tensors.items()},
        )
    yield "extra", {**tensors, "extra": torch.ones(2)}
    yield "none", {}


def damaged_bytes(contents: bytes, header: int) -> Iterator[tuple[str, bytes]]:
    """The file cut off at some places, and with a bit flipped at some places of its header."""
    for place in range(0, len(contents), max(1, len(contents) // 10)):
        yield f"cut at {place}", contents[:place]
    for place in range(0, header, max(1, header // 40)):
        flipped = bytearray(contents)
        flipped[place] ^= 1 << (place % 8)
        yield f"flipped at {place}", bytes(flipped)


def header_size(contents: bytes) -> int:
    """Of a safetensors file, the bytes before its numbers."""
    return 8 + int.from_bytes(contents[:8], "little")


def seal(path: Path, format_: str, text: str, tensors: Mapping[str, Tensor]) -> None:
    """A file as `write_checked` writes it, with any text for a header and a checksum that fits."""
    contents = dict(tensors)
    save_file(contents, path, {"corda": "\n".join((format_, digest(contents, text), text))})
