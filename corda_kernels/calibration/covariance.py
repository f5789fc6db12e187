"""What calibration yields, in memory and on disk: a covariance and statistics for every layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corda_kernels.calibration.packing import pack_symmetric, unpack_symmetric
from corda_kernels.errors import CovarianceError, CovarianceFileError
from corda_kernels.files import digest, write_tensors

_FORMAT = "corda_kernels.covariances/1"
_NORMALIZATIONS = ("tokens", "peft")


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
    """

    matrix: Tensor
    tokens: int
    calls: int
    absmax: Tensor
    outlier_count: Tensor
    outlier_threshold: float

    def merge(self, other: Covariance, *, normalize: str = "tokens") -> Covariance:
        """The covariance of both samples: the mean weighted by tokens, or by calls for "peft".

        Raises:
            CovarianceError: sizes or outlier thresholds differ.
        """
        if (
            self.matrix.shape != other.matrix.shape
            or self.outlier_threshold != other.outlier_threshold
        ):
            raise CovarianceError(
                f"covariances of {self.matrix.shape[0]} channels (outlier threshold "
                f"{self.outlier_threshold}) and {other.matrix.shape[0]} channels (threshold "
                f"{other.outlier_threshold}) cannot be merged"
            )
        weights = (
            (self.tokens, other.tokens) if normalize == "tokens" else (self.calls, other.calls)
        )
        share = weights[1] / max(sum(weights), 1)
        return Covariance(
            torch.lerp(self.matrix, other.matrix, share),
            self.tokens + other.tokens,
            self.calls + other.calls,
            torch.maximum(self.absmax, other.absmax),
            self.outlier_count + other.outlier_count,
            self.outlier_threshold,
        )


class CovarianceSet(Mapping[str, Covariance]):
    """Covariances by module name; modules that read the same tensor hold the same `Covariance`.

    Attributes:
        normalize: "tokens" (mean over tokens) or "peft" (each call divided by |max x|, mean over
            calls).
        left_out: weights of the model that calibration could not reach, by name, with the reason.
        provenance: JSON-like notes on where the numbers come from (model, data, versions,
            stability).
    """

    def __init__(
        self,
        covariances: Mapping[str, Covariance],
        *,
        normalize: str = "tokens",
        left_out: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if normalize not in _NORMALIZATIONS:
            raise CovarianceError(f'normalize must be "tokens" or "peft", got {normalize!r}')
        self._covariances = dict(covariances)
        self.normalize = normalize
        self.left_out = dict(left_out or {})
        self.provenance = dict(provenance or {})

    def __getitem__(self, name: str) -> Covariance:
        return self._covariances[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._covariances)

    def __len__(self) -> int:
        return len(self._covariances)

    def groups(self) -> list[tuple[Covariance, list[str]]]:
        """Each distinct covariance with the names of the modules that share it, in their order."""
        names: dict[int, list[str]] = {}
        for name, covariance in self.items():
            names.setdefault(id(covariance), []).append(name)
        return [(self[members[0]], members) for members in names.values()]

    def merge(self, other: CovarianceSet) -> CovarianceSet:
        """Both samples together, layer by layer, token-weighted; sharing is kept where both share.

        Raises:
            CovarianceError: the sets cover different layers or are normalised differently.
        """
        if self.normalize != other.normalize:
            raise CovarianceError(
                f'covariances normalised by "{self.normalize}" and "{other.normalize}" cannot merge'
            )
        if self.keys() != other.keys():
            odd = sorted(self.keys() ^ other.keys())
            raise CovarianceError(
                f"the two covariance sets cover different layers ({odd[0]} and {len(odd) - 1} more "
                "are in one only): calibrate both with the same model and targets"
            )
        merged: dict[tuple[int, int], Covariance] = {}
        result: dict[str, Covariance] = {}
        for name, mine in self.items():
            pair = (id(mine), id(other[name]))
            if pair not in merged:
                merged[pair] = mine.merge(other[name], normalize=self.normalize)
            result[name] = merged[pair]
        provenance = dict(self.provenance)
        if "tokens" in self.provenance and "tokens" in other.provenance:
            provenance["tokens"] += other.provenance["tokens"]
        return CovarianceSet(
            result, normalize=self.normalize, left_out=self.left_out, provenance=provenance
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one checksummed safetensors file, atomically; shared matrices once, as triangles.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        records = []
        for index, (covariance, names) in enumerate(self.groups()):
            tensors[f"{index}.matrix"] = pack_symmetric(covariance.matrix.cpu())
            tensors[f"{index}.absmax"] = covariance.absmax.cpu()
            tensors[f"{index}.outlier_count"] = covariance.outlier_count.cpu()
            records.append(
                {
                    "modules": names,
                    "channels": covariance.matrix.shape[0],
                    "tokens": covariance.tokens,
                    "calls": covariance.calls,
                    "outlier_threshold": covariance.outlier_threshold,
                }
            )
        header = {
            "groups": records,
            "order": list(self),
            "normalize": self.normalize,
            "left_out": self.left_out,
            "provenance": self.provenance,
        }
        text = json.dumps(header, ensure_ascii=False)
        write_tensors(
            path,
            tensors,
            {"format": _FORMAT, "corda": text, "sha256": digest(tensors, text)},
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> CovarianceSet:
        """Reads a file written by `save` and verifies its checksum.

        Raises:
            CovarianceFileError: the file is missing, truncated, altered, or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise CovarianceFileError(
                f"{path}: no such covariance file; write one with `corda-kernels calibrate`"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CovarianceFileError(
                        f"{path} is a safetensors file, but not of covariances written by this "
                        f"package (format {metadata.get('format')!r}, expected {_FORMAT!r})"
                    )
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CovarianceFileError(
                f"{path} is truncated or not a safetensors file ({error}): copy or calibrate it "
                "again"
            ) from error
        if digest(tensors, metadata.get("corda", "")) != metadata.get("sha256"):
            raise CovarianceFileError(
                f"{path}: the contents do not match their checksum; the file was altered or "
                "damaged: copy or calibrate it again"
            )
        header = json.loads(metadata["corda"])
        covariances: dict[str, Covariance] = {}
        for index, record in enumerate(header["groups"]):
            covariance = Covariance(
                unpack_symmetric(tensors.pop(f"{index}.matrix"), record["channels"]).to(device),
                record["tokens"],
                record["calls"],
                tensors.pop(f"{index}.absmax").to(device),
                tensors.pop(f"{index}.outlier_count").to(device),
                record["outlier_threshold"],
            )
            covariances.update(dict.fromkeys(record["modules"], covariance))
        return cls(
            {name: covariances[name] for name in header["order"]},
            normalize=header["normalize"],
            left_out=header["left_out"],
            provenance=header["provenance"],
        )
