"""What calibration yields, in memory and on disk: covariances by the names of their layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda_kernels import arguments, fields
from corda_kernels.calibration.covariance import NORMALIZATIONS, Covariance, Gradient, Group
from corda_kernels.calibration.covariance_file import GRADIENT, read_groups, write_groups
from corda_kernels.errors import CovarianceError, CovarianceFileError
from corda_kernels.files import read_checked, write_checked
from corda_kernels.outputs import atomic_path, temporary_folder

_FILE: Any = {
    "format_": "corda_kernels.covariances/1",
    "what": "covariance",
    "error": CovarianceFileError,
    "remedy": "copy or calibrate it again",
}
# Notes on which text a set was taken from.
_OF_TEXT = ("data", "domain", "mixture")

# What the fields of a file may hold.
_HEADER_FIELDS: dict[str, fields.Check] = {
    "order": fields.is_names,
    "normalize": fields.one_of(*NORMALIZATIONS),
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


class CovarianceSet(Mapping[str, Covariance]):
    """Covariances by module name; modules that read the same tensor share one `Covariance`.

    Attributes:
        normalize: "tokens" (mean over tokens) or "peft" (each call divided by |max x|, mean over
            calls).
        left_out: weights of the model that calibration could not reach, by name, with the reason.
        gradients: D and Ḡ by layer name, from `calibrate(…, sides="both")`; otherwise empty.
        provenance: JSON-like notes on where the numbers come from (model, data, versions,
            stability).

    Raises:
        CovarianceError: an argument has the wrong type or value.
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
        arguments.one_of("normalize", normalize, NORMALIZATIONS, CovarianceError)
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
        """The covariances of both samples together, weighted by tokens, layer by layer.

        Layers share a covariance if they do in both sets. Of the provenance, notes on the text are
        kept where both agree; stability and selection, which are about one sample, are dropped.

        Args:
            other: covariances of the same model, normalised in the same way.
            names: layers of either set, in the order wanted; a layer of one set alone is taken from
                there. None if both sets cover the same layers.

        Raises:
            CovarianceError: the sets cover different layers or are normalised differently, or only
                one has gradients, or the gradients are of different labels.

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
        provenance = {
            note: value
            for note, value in self.provenance.items()
            if note not in ("stability", "selection")
            and (note not in _OF_TEXT or other.provenance.get(note) == value)
        }
        if "tokens" in self.provenance and "tokens" in other.provenance:
            provenance["tokens"] += other.provenance["tokens"]
        return CovarianceSet(
            result,
            normalize=self.normalize,
            left_out={name: reasons[name] for name in reasons if name not in result},
            provenance=provenance,
            gradients={name: gradients[name] for name in result if name in gradients},
        )

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
        write_groups(path, _FILE["format_"], self.groups(), header, [*self.gradients.items()])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CovarianceSet:
        """Reads a file written by `save` and verifies its checksum; tensors are on the CPU.

        Raises:
            CovarianceFileError: the file is missing, truncated, altered, or of another kind.
        """
        cpu = torch.device("cpu")
        header, groups, gradients = read_groups(path, _HEADER_FIELDS, cpu, **_FILE)
        names = [name for _, members in groups for name in members]
        if sorted(names) != sorted(header["order"]):
            reason = "its header does not name the layers of the groups, each once"
            raise CovarianceFileError(f"{path}: {reason}: {_FILE['remedy']}")
        found = {name: covariance for covariance, members in groups for name in members}
        about = {name: header[name] for name in ("normalize", "left_out", "provenance")}
        covariances = {name: found[name] for name in header["order"]}
        return cls(covariances, gradients=dict(gradients), **about)


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
    read: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    with temporary_folder(path) as folder:
        # No enumerate: it would hold a piece while the next one is made.
        for piece in pieces:
            file = folder / str(len(read))
            piece.save(file)
            del piece
            read.append(read_checked(file, mapped=True, **_FILE))
        notes = [header["provenance"] for header, _ in read]
        if len(read) == 1:
            with atomic_path(path) as temporary:
                os.replace(folder / "0", temporary)
            return
        if "gradients" in read[0][0]:  # which come from the last block to the first
            read.reverse()
            whole["gradients"] = []
        for header, mapped in read:
            first = {"": len(whole["groups"]), GRADIENT: len(whole.get("gradients", ()))}
            for name, tensor in mapped.items():
                *kind, index, part = name.split(".")
                number = first["".join(kind)] + int(index)
                tensors[".".join([*kind, str(number), part])] = tensor
            for key in whole.keys() & {"groups", "order", "gradients"}:
                whole[key] += header[key]
            whole["left_out"] |= header["left_out"]
            whole["normalize"] = header["normalize"]
        write_checked(path, _FILE["format_"], whole | {"provenance": provenance(notes)}, tensors)
