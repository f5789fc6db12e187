"""What calibration yields, in memory and on disk: a covariance and statistics for every layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda_kernels import arguments, fields
from corda_kernels.errors import ConfigError, CovarianceError, CovarianceFileError
from corda_kernels.files import read_checked, write_checked
from corda_kernels.kernels import symmetrize_
from corda_kernels.outputs import atomic_path, temporary_folder

_FILE: Any = {
    "format_": "corda_kernels.covariances/1",
    "what": "covariance",
    "error": CovarianceFileError,
    "remedy": "copy or calibrate it again",
}
_NORMALIZATIONS = ("tokens", "peft")
_NUMBERS = ("tokens", "calls", "outlier_threshold")
# What the names of a gradient's tensors in a file begin with.
_GRADIENT = "gradient"
# Notes on which text a set was taken from.
_OF_TEXT = ("data", "domain", "mixture")

# What the fields of a file may hold.
_GROUP_FIELDS: dict[str, fields.Check] = {
    "modules": lambda value: fields.is_names(value) and len(value) > 0,
    "channels": fields.whole(1),
    "tokens": fields.is_whole,
    "calls": fields.is_whole,
    "outlier_threshold": lambda value: fields.is_number(value, 0) or value == math.inf,
}
_HEADER_FIELDS: dict[str, fields.Check] = {
    "order": fields.is_names,
    "normalize": fields.one_of(*_NORMALIZATIONS),
    "left_out": fields.is_texts,
    "gradients?": fields.is_names,
    "provenance": lambda value: (
        fields.is_object(value)
        and all(check(value[note]) for note, check in _NOTES.items() if note in value)
    ),
}
# Of the notes on where the numbers come from, those that are read again.
_NOTES: dict[str, fields.Check] = {
    "model": fields.is_text,
    "tokens": fields.is_whole,
    "versions": fields.is_texts,
    "domain": fields.is_text,
    "mixture": fields.is_object,
    "selection": fields.is_object,
    "stability": fields.maybe(fields.is_object),
}


@dataclass(frozen=True, eq=False)
class Covariance:
    """Second moment of one layer's inputs, C = (1/n) Σ x xᵀ, with channel statistics.

    Attributes:
        matrix: (in, in) float32 (or float64), symmetric; the mean over tokens, or over hook calls
            where the set's `normalize` is "peft".
        tokens: number of tokens it was taken from.
        calls: number of forward calls of the layer.
        absmax: (in,) float32, the largest |x| of each channel.
        outlier_count: (in,) int64, how many |x| of each channel exceeded the threshold.
        outlier_threshold: in units of x.

    Raises:
        CovarianceError: a value is not what it must be. Entries are not read.
    """

    matrix: Tensor
    tokens: int
    calls: int
    absmax: Tensor
    outlier_count: Tensor
    outlier_threshold: float

    def __post_init__(self) -> None:
        """Refuses values of another kind or shape."""
        arguments.real_tensor("a covariance's matrix", self.matrix, CovarianceError)
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1]:
            raise CovarianceError(f"a covariance's matrix must be (in, in), got {shape}")
        for name in ("absmax", "outlier_count"):
            statistic = getattr(self, name)
            arguments.instance_of(name, statistic, Tensor, CovarianceError)
            if statistic.shape != shape[:1]:
                raise CovarianceError(f"{name} must be {shape[:1]}, got {tuple(statistic.shape)}")
        for name in ("tokens", "calls"):
            arguments.whole_number(name, getattr(self, name), 0, error=CovarianceError)
        number = partial(arguments.real_number, error=CovarianceError)
        number("outlier_threshold", self.outlier_threshold, "at least 0", lambda x: x >= 0)

    def merge(self, other: Covariance, *, normalize: str = "tokens") -> Covariance:
        """The covariance of both samples: the mean weighted by tokens, or by calls for "peft".

        Raises:
            CovarianceError: sizes or outlier thresholds differ, or `normalize` is not possible.
        """
        arguments.instance_of("other", other, Covariance, CovarianceError)
        arguments.one_of("normalize", normalize, _NORMALIZATIONS, CovarianceError)
        pair = (self, other)
        here, there = ((len(part.matrix), part.outlier_threshold) for part in pair)
        if here != there:
            says = "covariances of (channels, outlier threshold)"
            raise CovarianceError(f"{says} {here} and {there} cannot be merged")
        mine, theirs = (part.tokens if normalize == "tokens" else part.calls for part in pair)
        dtype = torch.promote_types(self.matrix.dtype, other.matrix.dtype)
        share = theirs / max(mine + theirs, 1)
        return Covariance(
            torch.lerp(self.matrix.to(dtype), other.matrix.to(dtype), share),
            self.tokens + other.tokens,
            self.calls + other.calls,
            torch.maximum(self.absmax, other.absmax),
            self.outlier_count + other.outlier_count,
            self.outlier_threshold,
        )


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient side of one layer, see `calibrate` for what is averaged over.

    Attributes:
        matrix: D = E[g gᵀ] (out, out) float32 (or float64), symmetric, with g the gradient at the
            layer's output.
        mean: Ḡ = E[g xᵀ] (out, in), of the same dtype: the gradient for the layer's weight.

    Raises:
        CovarianceError: a value is no such tensor. Entries are not read.
    """

    matrix: Tensor
    mean: Tensor

    def __post_init__(self) -> None:
        """Refuses values of another kind or shape."""
        for name in ("matrix", "mean"):
            arguments.real_tensor(f"a gradient's {name}", getattr(self, name), CovarianceError)
        square, shape = tuple(self.matrix.shape), tuple(self.mean.shape)
        if len(shape) != 2 or square != 2 * shape[:1]:
            raise CovarianceError(f"D {square} and Ḡ {shape} must be (out, out) and (out, in)")

    def to(self, device: str | torch.device) -> Gradient:
        """The same on another device."""
        return Gradient(self.matrix.to(device), self.mean.to(device))

    def merge(self, other: Gradient, share: float) -> Gradient:
        """The mean of both, of which the other's weight is `share`."""
        return Gradient(
            torch.lerp(self.matrix, other.matrix, share), torch.lerp(self.mean, other.mean, share)
        )


# A covariance and the names of the layers that share it.
Group = tuple[Covariance, list[str]]


class CovarianceSet(Mapping[str, Covariance]):
    """Covariances by module name; modules that read the same tensor hold the same `Covariance`.

    Attributes:
        normalize: "tokens" (mean over tokens) or "peft" (each call divided by |max x|, mean over
            calls).
        left_out: weights of the model that calibration could not reach, by name, with the reason.
        gradients: D and Ḡ of every layer by its name, of `calibrate(…, sides="both")`; else {}.
        provenance: JSON-like notes on where the numbers come from (model, data, versions,
            stability).

    Raises:
        CovarianceError: a value is not what it must be.
    """

    def __init__(
        self,
        covariances: Mapping[str, Covariance],
        *,
        normalize: str = "tokens",
        left_out: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        gradients: Mapping[str, Gradient] | None = None,
    ) -> None:
        arguments.one_of("normalize", normalize, _NORMALIZATIONS, CovarianceError)
        instance_of = partial(arguments.instance_of, error=CovarianceError)
        instance_of("covariances", covariances, Mapping)
        instance_of("left_out", left_out or {}, Mapping)
        instance_of("provenance", provenance or {}, Mapping)
        for name, covariance in covariances.items():
            instance_of("a layer's name", name, str)
            instance_of(f"what is given for {name}", covariance, Covariance)
        for name, gradient in (gradients or {}).items():
            instance_of(f"the gradient of {name}", gradient, Gradient)
            if name not in covariances or gradient.mean.shape[1] != len(covariances[name].matrix):
                says = f"the gradient of layer {name} has no covariance of its inputs beside it"
                raise CovarianceError(says)
        self._covariances = dict(covariances)
        self.normalize = normalize
        self.left_out = dict(left_out or {})
        self.provenance = dict(provenance or {})
        self.gradients = dict(gradients or {})

    def __getitem__(self, name: str) -> Covariance:
        return self._covariances[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._covariances)

    def __len__(self) -> int:
        return len(self._covariances)

    def groups(self) -> list[Group]:
        """Each distinct covariance with the names of the modules that share it, in their order."""
        names: dict[int, list[str]] = {}
        for name, covariance in self.items():
            names.setdefault(id(covariance), []).append(name)
        return [(self[members[0]], members) for members in names.values()]

    def merge(self, other: CovarianceSet, *, names: Sequence[str] | None = None) -> CovarianceSet:
        """Both samples together, layer by layer, token-weighted; sharing is kept where both share.

        Notes on what the text was are kept where both say the same. Stability and selection were
        of one sample alone, and are not.

        Args:
            other: of the same model, normalised alike.
            names: the layers of either, in the order that they are to have. One that is in one set
                only is then what it is there; without names both sets must cover the same.

        Raises:
            CovarianceError: the sets cover different layers or are normalised differently, or only
                one has gradients, or theirs are of other labels.
        """
        arguments.instance_of("other", other, CovarianceSet, CovarianceError)
        if self.normalize != other.normalize:
            both = f'"{self.normalize}" and "{other.normalize}"'
            raise CovarianceError(f"covariances normalised by {both} cannot merge")
        if self.keys() != other.keys() and names is None:
            odd = sorted(self.keys() ^ other.keys())
            says = f"the covariance sets cover different layers (such as {odd[0]})"
            raise CovarianceError(f"{says}: calibrate both with the same model and targets")
        labels = [part.provenance.get("labels") for part in (self, other) if part.gradients]
        if labels and labels != labels[:1] * 2:
            says = "covariances merge where both have gradients of the same kind of labels, or none"
            raise CovarianceError(f"{says}: calibrate both with the same sides and labels")
        merged: dict[tuple[int, ...], Covariance] = {}
        result: dict[str, Covariance] = {}
        for name in self if names is None else names:
            found = [part[name] for part in (self, other) if name in part]
            key = tuple(map(id, found))
            if key not in merged:
                first, *others = found
                merged[key] = first.merge(*others, normalize=self.normalize) if others else first
            result[name] = merged[key]
        gradients = self.gradients | other.gradients
        for name in self.gradients.keys() & other.gradients.keys():
            share = other[name].tokens / max(result[name].tokens, 1)
            gradients[name] = self.gradients[name].merge(other.gradients[name], share)
        reasons = self.left_out | other.left_out
        left_out = {name: reasons[name] for name in reasons if name not in result}
        provenance = {
            note: value
            for note, value in self.provenance.items()
            if note not in ("stability", "selection")
            and (note not in _OF_TEXT or other.provenance.get(note) == value)
        }
        if "tokens" in self.provenance and "tokens" in other.provenance:
            provenance["tokens"] += other.provenance["tokens"]
        about: dict[str, Any] = {
            "left_out": left_out,
            "provenance": provenance,
            "gradients": {name: gradients[name] for name in result if name in gradients},
        }
        return CovarianceSet(result, normalize=self.normalize, **about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one checksummed safetensors file, atomically; shared matrices once, as triangles.

        Raises:
            OutputError: the file cannot be written.
        """
        header = {
            "order": list(self),
            "left_out": self.left_out,
            "normalize": self.normalize,
            "provenance": self.provenance,
        }
        write_groups(path, _FILE["format_"], self.groups(), header, self.gradients)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> CovarianceSet:
        """Reads a file written by `save` and verifies its checksum.

        Raises:
            CovarianceFileError: the file is missing, truncated, altered, or of another kind.
            ConfigError: the device is not there, or too small.
        """
        header, groups, gradients = read_groups(path, _HEADER_FIELDS, device, **_FILE)
        names = [name for _, members in groups for name in members]
        if sorted(names) != sorted(header["order"]):
            reason = "its header does not name the layers of the groups, each once"
            raise CovarianceFileError(f"{path}: {reason}: {_FILE['remedy']}")
        covariances = {name: covariance for covariance, members in groups for name in members}
        about = {name: header[name] for name in ("normalize", "left_out", "provenance")}
        covariances = {name: covariances[name] for name in header["order"]}
        return cls(covariances, gradients=gradients, **about)


def save_pieces(
    pieces: Iterable[CovarianceSet],
    path: str | os.PathLike[str],
    provenance: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> None:
    """Writes sets of different layers as one file, the same that `save` writes of their union.

    Only one of them is in memory at a time; the others wait on the disk beside `path`.

    Args:
        pieces: at least one, with the same normalisation.
        path: the file.
        provenance: of the whole, made of that of the pieces; a single piece keeps its own.

    Raises:
        OutputError: a file cannot be written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    whole: dict[str, Any] = {"groups": [], "order": [], "left_out": {}}
    notes: list[dict[str, Any]] = []
    with temporary_folder(path) as folder:
        # No enumerate: it would hold a piece while the next one is made.
        for piece in pieces:
            number = len(notes)
            piece.save(folder / str(number))
            notes.append(piece.provenance)
            del piece
            header, mapped = read_checked(folder / str(number), mapped=True, **_FILE)
            first = len(whole["groups"])
            for name, tensor in mapped.items():
                index, _, part = name.partition(".")
                if index != _GRADIENT:  # a piece that has some is the only one
                    tensors[f"{first + int(index)}.{part}"] = tensor
            whole["groups"] += header["groups"]
            whole["order"] += header["order"]
            whole["left_out"] |= header["left_out"]
            whole["normalize"] = header["normalize"]
        if len(notes) == 1:
            with atomic_path(path) as temporary:
                os.replace(folder / "0", temporary)
            return
        write_checked(path, _FILE["format_"], whole | {"provenance": provenance(notes)}, tensors)


def write_groups(
    path: str | os.PathLike[str],
    format_: str,
    groups: Iterable[Group],
    header: Mapping[str, Any],
    gradients: Mapping[str, Gradient] | None = None,
) -> None:
    """Writes covariances, each with the modules that share it, as a checked file.

    Only the lower triangle of a symmetric matrix is read. `header` gets a record of the groups, and
    of the gradients where there are some.

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
    for index, gradient in enumerate((gradients or {}).values()):
        tensors[f"{_GRADIENT}.{index}.matrix"] = pack_symmetric(gradient.matrix).cpu()
        tensors[f"{_GRADIENT}.{index}.mean"] = gradient.mean.cpu().contiguous()
    noted = {"gradients": list(gradients)} if gradients else {}
    write_checked(path, format_, {"groups": records, **noted, **header}, tensors)


def read_groups(
    path: str | os.PathLike[str],
    schema: Mapping[str, fields.Check],
    device: str | torch.device,
    **file: Any,
) -> tuple[dict[str, Any], list[Group], dict[str, Gradient]]:
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
        gradients = {
            name: _gradient(name, f"{_GRADIENT}.{index}", tensors, channels).to(device)
            for index, name in enumerate(header.get("gradients", ()))
        }
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
    packed, mean = (tensors.pop(f"{prefix}.{part}", None) for part in ("matrix", "mean"))
    if packed is None or mean is None or mean.ndim != 2 or mean.shape[1] != channels.get(name):
        raise ValueError(f"the gradient of {name!r} is incomplete, or of another size")
    d = len(mean)
    if packed.shape != (d * (d + 1) // 2,) or {packed.dtype, mean.dtype} not in (
        {torch.float32},
        {torch.float64},
    ):
        raise ValueError(f"the gradient of {name!r} has another size or dtype")
    if not bool(packed.isfinite().all() and mean.isfinite().all()):
        raise ValueError(f"the gradient of {name!r} holds NaN or Inf")
    return Gradient(unpack_symmetric(packed, d), mean)


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


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The d(d+1)/2 numbers of the lower triangle of a (d, d) matrix, flat, in its dtype.

    LAPACK's rectangular full packed idea: of the triangle [[L₁, ·], [F, L₂]] the rectangle F lies
    beside an almost square block, which holds L₁ in its lower part and L₂ᵀ in its upper part. Block
    copies need no index or mask of d² entries, as gathering the triangle would.
    """
    d = matrix.shape[0]
    packed = matrix.new_empty(d * (d + 1) // 2)
    block, rectangle, row, column = _packed_parts(packed, d)
    small, large = rectangle.shape
    block[:row] = 0
    block[row:] = matrix[:large, :large].tril()
    block[:small, column:] += matrix[large:, large:].mT.triu()
    rectangle.copy_(matrix[large:, :large])
    return packed


def unpack_symmetric(packed: Tensor, d: int, *, out: Tensor | None = None) -> Tensor:
    """The symmetric (d, d) matrix that `pack_symmetric` packed; in `out` if there is one."""
    block, rectangle, row, column = _packed_parts(packed, d)
    small, large = rectangle.shape
    matrix = packed.new_empty((d, d)) if out is None else out
    matrix[:large, :large] = block[row:]
    matrix[large:, large:] = block[:small, column:].mT
    matrix[large:, :large] = rectangle
    return symmetrize_(matrix)


def _packed_parts(packed: Tensor, d: int) -> tuple[Tensor, Tensor, int, int]:
    """The block, the rectangle, and where in the block L₁ starts (row) and L₂ᵀ (column)."""
    small = d // 2
    large = d - small
    row, column = (1, 0) if large == small else (0, 1)
    size = (large + row) * large
    block, rectangle = packed[:size], packed[size:]
    return block.view(large + row, large), rectangle.view(small, large), row, column
