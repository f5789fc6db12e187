"""Calibration that survives a kill: its sums are kept in a file every so many tokens.

Sums are only ever kept between batches, when every shared tensor has been settled, so that a run
that goes on from them adds the same numbers in the same order as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance import read_groups, write_groups
from corda_kernels.errors import CheckpointError, CordaWarning, OutputError
from corda_kernels.files import digest
from corda_kernels.models import linear_weight

_FORMAT = "corda_kernels.calibration/1"
_SAMPLES = 64  # entries of each weight by which a model is recognised

# Share of the run's time that may go into writing, and how many floating-point operations a machine
# does in the time in which it writes a byte. 2 CPU cores were measured to do 300 (SmolLM2-135M:
# 2.4 ms a token, 0.5 s for 203 MB); a GPU does far more beside the same disk, and rarely gains from
# a checkpoint.
_SHARE = 0.01
_FLOP_PER_BYTE = {"cpu": 1_000}
_FLOP_PER_BYTE_ELSEWHERE = 200_000


@dataclass(frozen=True)
class CalibrationCheckpoint:
    """Where a calibration keeps its sums while it runs.

    Attributes:
        path: the file; it appears after `every` tokens, and stays until `discard`.
        every: tokens between two writes; None for so many that writing takes about a hundredth of
            the time. Sums are kept at the end of the batch in which the count is reached.
        resume: whether to go on from what the file holds, if it is there.
    """

    path: str | os.PathLike[str]
    every: int | None = None
    resume: bool = False

    def kept(self) -> list[Path]:
        """What there is of it: the file itself, or its parts."""
        return self._matching("{}")

    def parts(self, count: int) -> list[CalibrationCheckpoint]:
        """One for each of the calibrations that make up a run; the file itself where there is one.

        Raises:
            CheckpointError: the run to resume was made up of another number of them.
        """
        parts = [replace(self, path=f"{os.fspath(self.path)}-{i + 1}") for i in range(count)]
        parts = parts if count > 1 else [self]
        kept = self.kept()
        if self.resume and kept and not any(Path(part.path) in kept for part in parts):
            raise _foreign(kept[0], "stability")
        return parts

    def discard(self) -> None:
        """Deletes it and what a kill left half written, once the run's result is safe."""
        for file in self._matching("{}", r"\.{}\..*\.part"):
            file.unlink(missing_ok=True)

    def _matching(self, *patterns: str) -> list[Path]:
        """Files that are named like one of the patterns, in which {} stands for its name."""
        path = Path(self.path)
        name = rf"{re.escape(path.name)}(-\d+)?"
        return sorted(
            file
            for file in path.parent.glob("*")
            if any(re.fullmatch(pattern.format(name), file.name) for pattern in patterns)
        )


class Journal:
    """Follows a calibration batch by batch, and keeps or restores its sums.

    Args:
        checkpoint: where to; None for nowhere.
        capture: whose sums they are.
        model: that is calibrated.
        device: that it runs on.

    Raises:
        CheckpointError: the file to go on from is damaged, or of another model or other options.
    """

    def __init__(
        self,
        checkpoint: CalibrationCheckpoint | None,
        capture: InputCapture,
        model: nn.Module,
        device: torch.device,
    ) -> None:
        self._checkpoint = checkpoint
        self._capture = capture
        self._device = device
        self._text = hashlib.sha256()
        self._restored = 0  # batches whose sums came from the file
        self._restored_text = ""
        self._kept_tokens = 0
        if checkpoint is None:
            return
        self._fingerprint = _fingerprint(model, capture, device)
        if checkpoint.resume and Path(checkpoint.path).exists():
            self._restore(checkpoint)

    def covers(self, batch: int) -> bool:
        """Whether the sums hold this batch already, counted from 0."""
        return batch < self._restored

    def read(self, inputs: Mapping[str, Tensor]) -> None:
        """Notes what a batch holds, whether or not it runs."""
        if self._checkpoint is not None:
            self._text.update(digest(inputs).encode())

    def end_batch(self, batch: int, tokens: int) -> None:
        """Keeps the sums if it is time to; `tokens` is the count so far.

        Raises:
            CheckpointError: the batches up to here are not those that the file's sums are of.
        """
        if self._checkpoint is None or batch + 1 < self._restored:
            return
        if batch + 1 == self._restored:
            if self._text.hexdigest() != self._restored_text:
                raise _foreign(self._checkpoint.path, "data")
            self._kept_tokens = tokens
        elif tokens - self._kept_tokens >= self._interval():
            self._keep(self._checkpoint, batch + 1)
            self._kept_tokens = tokens

    def end(self, batches: int) -> None:
        """Makes sure that the sums hold no more than the batches that there were.

        Raises:
            CheckpointError: they do.
        """
        if self._checkpoint is not None and batches < self._restored:
            raise _foreign(self._checkpoint.path, "data")

    def _interval(self) -> int:
        """Tokens between two writes."""
        assert self._checkpoint is not None
        if self._checkpoint.every is not None:
            return self._checkpoint.every
        groups = self._capture.sums()
        size = sum(2 * covariance.matrix.shape[0] ** 2 for covariance, _ in groups)
        work = sum(covariance.matrix.shape[0] ** 2 for covariance, _ in groups)
        for _, names in groups:
            work += sum(2 * linear_weight(self._capture.modules[name]).numel() for name in names)
        rate = _FLOP_PER_BYTE.get(self._device.type, _FLOP_PER_BYTE_ELSEWHERE)
        return math.ceil(size * rate / work / _SHARE)

    def _keep(self, checkpoint: CalibrationCheckpoint, batches: int) -> None:
        header = {
            "fingerprint": self._fingerprint,
            "batches": batches,
            "text": self._text.hexdigest(),
        }
        try:
            write_groups(checkpoint.path, _FORMAT, self._capture.sums(), header)
        except OutputError as error:
            warnings.warn(
                f"this run's progress could not be kept: {error}; it goes on, and can be resumed "
                "from the last checkpoint that was written",
                CordaWarning,
                stacklevel=6,  # the caller of calibrate, which no_grad wraps
            )

    def _restore(self, checkpoint: CalibrationCheckpoint) -> None:
        remedy = "delete it and start again"
        header, groups = read_groups(
            checkpoint.path,
            _FORMAT,
            what="calibration checkpoint",
            error=CheckpointError,
            remedy=remedy,
        )
        try:
            found = dict(header["fingerprint"])
            self._restored, self._restored_text = int(header["batches"]), str(header["text"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: its header is not that of a calibration checkpoint file "
                f"({error!r}): {remedy}"
            ) from error
        differing = [key for key, value in self._fingerprint.items() if found.get(key) != value]
        if differing:
            raise _foreign(checkpoint.path, *differing)
        for part, names in groups:
            for name in names:
                module = self._capture.modules.get(name)
                if module is None or linear_weight(module).shape[1] != part.matrix.shape[0]:
                    raise CheckpointError(
                        f"{checkpoint.path} holds sums that do not fit layer {name}: {remedy}"
                    )
        self._capture.restore(groups)


def _foreign(path: str | os.PathLike[str], *differing: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is the checkpoint of another run, which differs in "
        f"{', '.join(differing)}: "
        "resume with what that run was started with, or delete the file and start again"
    )


def _fingerprint(model: nn.Module, capture: InputCapture, device: torch.device) -> dict[str, Any]:
    """What a run depends on besides its text, by the name under which it is reported."""
    return {
        "model": _weights_digest(model),
        "targets": hashlib.sha256("\n".join(capture.modules).encode()).hexdigest(),
        "outlier_threshold": capture.outlier_threshold,
        "normalize": capture.normalize,
        "device": device.type,
    }


def _weights_digest(model: nn.Module) -> str:
    """A checksum over the names, sizes and dtypes of all weights, and over entries of each."""
    samples = {}
    sizes = []
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        sizes.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device.type != "meta":  # offloaded: its values are elsewhere
            flat = tensor.detach().reshape(-1)
            samples[name] = flat[:: max(1, math.ceil(flat.numel() / _SAMPLES))]
    return digest(samples, "\n".join(sizes))
