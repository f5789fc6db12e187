"""What ranks must have been given alike, as names, numbers and checksums for `Ranks.agree`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import batch_digest
from corda_kernels.calibration.checkpoint import CalibrationCheckpoint, weights_digest
from corda_kernels.calibration.covariance import CovarianceSet
from corda_kernels.calibration.subject import Subject
from corda_kernels.files import digest


class TextSum:
    """A checksum over the batches of a text, in their order, and their number."""

    def __init__(self, batches: Iterable[Tensor | Mapping[str, Any]] = ()) -> None:
        self._batches = 0
        self._sum = hashlib.sha256()
        for batch in batches:
            self.add(batch)

    def add(self, batch: Tensor | Mapping[str, Any]) -> None:
        """Takes in the next batch."""
        self._batches += 1
        self._sum.update(batch_digest(batch).encode())

    def given(self) -> dict[str, object]:
        """Both by name."""
        return {"number of batches": self._batches, "data": self._sum.hexdigest()}


def text_given(batches: Iterable[Tensor | Mapping[str, Any]]) -> dict[str, object]:
    """The text; nothing of one that may be read but once, which is compared at its end."""
    return TextSum(batches).given() if isinstance(batches, Sequence | Tensor) else {}


def layers_given(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, object]:
    """Weights and their dtypes, and which layers it is about.

    Args:
        modules: that hold the weights, see `weights_digest`.
        targets: names of the layers.
    """
    dtypes = {
        str(parameter.dtype).removeprefix("torch.")
        for module in modules.values()
        for parameter in module.parameters()
    }
    return {
        "targets": digest({}, "\n".join(targets)),
        "dtype": ", ".join(sorted(dtypes)),
        "weights": weights_digest(modules),
    }


def covariances_given(covariances: CovarianceSet) -> dict[str, object]:
    """The covariances, by which layers share them, their tokens and their Frobenius norms.

    No checksum: where one rank has summed up on the host for want of memory, the last bits differ.
    """
    groups = covariances.groups()
    counts = [(names, part.tokens, part.calls) for part, names in groups]
    norms = [part.matrix.norm(dim=-1).norm().double().cpu() for part, _ in groups]
    return {
        "tokens of the covariances": digest({}, str(counts)),
        "covariances": torch.stack(norms) if norms else torch.empty(0),
        "normalization": covariances.normalize,
    }


def run_given(
    subject: Subject,
    batches: Iterable[Tensor | Mapping[str, Any]],
    checkpoint: CalibrationCheckpoint | None,
    **options: object,
) -> dict[str, object]:
    """All that a calibration depends on.

    A checkpoint's path may be another on every rank, each of which has files of its own.
    """
    kept = "none" if checkpoint is None else ("resumed" if checkpoint.resume else "kept")
    return {
        **layers_given({"": subject.model}, subject.linears),
        "device": subject.device.type,
        **text_given(batches),
        **options,
        "checkpoint": kept,
    }
