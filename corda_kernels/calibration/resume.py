"""Calibration that survives a kill: its sums are kept in a file every so many tokens.

Sums are only ever kept between batches, when every shared tensor has been settled, so that a run
that goes on from them adds the same numbers in the same order as one that was never interrupted.
Each of several ranks keeps those of its own batches, and goes on from where they end: what the
others have done meanwhile does not matter, since sums meet at the end of the text only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import batch_digest
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.checkpoint import (
    CalibrationCheckpoint,
    check_distinct,
    fingerprint,
    foreign,
    read_sums,
    write_sums,
)
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.fields import is_text, is_whole


class Journal:
    """Follows a calibration batch by batch, and keeps or restores its sums.

    Args:
        checkpoint: where to; None for nowhere.
        capture: whose sums they are.
        model: that is calibrated.
        device: that it runs on.
        ranks: that share the batches.

    Raises:
        CheckpointError: the file to go on from is damaged, or of another model or other options.
    """

    def __init__(
        self,
        checkpoint: CalibrationCheckpoint | None,
        capture: InputCapture,
        model: nn.Module,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._checkpoint = checkpoint and checkpoint.of_rank(ranks)
        self._capture = capture
        self._device = device
        self._ranks = ranks
        self._text = hashlib.sha256()
        self._restored = 0  # batches whose sums came from the file, those of other ranks included
        self._restored_text = ""
        self._kept_tokens = 0
        if self._checkpoint is None:
            return
        self._fingerprint = fingerprint(
            model,
            capture.modules,
            device,
            outlier_threshold=capture.outlier_threshold,
            normalize=capture.normalize,
            ranks=ranks,
        )
        if self._checkpoint.resume and Path(self._checkpoint.path).exists():
            values, groups = read_sums(
                self._checkpoint.path,
                self._fingerprint,
                capture.modules,
                # Sums are of a batch at least, or those before the first one would count twice.
                {"batches": lambda value: is_whole(value, 1), "text": is_text},
            )
            check_distinct(self._checkpoint.path, groups)
            self._restored, self._restored_text = values["batches"], values["text"]
            capture.restore(groups)

    def covers(self, batch: int) -> bool:
        """Whether the sums hold this batch already, counted from 0."""
        return batch < self._restored

    def read(self, batch: Tensor | Mapping[str, Any]) -> None:
        """Notes what a batch of this rank holds, whether or not it runs."""
        if self._checkpoint is not None:
            self._text.update(batch_digest(batch).encode())

    def end_batch(self, batch: int, tokens: int) -> None:
        """Keeps the sums if it is time to; `tokens` is the count so far, on all ranks.

        Raises:
            CheckpointError: the batches up to here are not those that the file's sums are of.
        """
        if self._checkpoint is None or batch + 1 < self._restored:
            return
        if batch + 1 == self._restored:
            if self._text.hexdigest() != self._restored_text:
                raise foreign(self._checkpoint.path, "data")
            self._kept_tokens = tokens
        elif tokens - self._kept_tokens >= self._interval():
            self._keep(batch + 1)
            self._kept_tokens = tokens

    def end(self, batches: int) -> None:
        """Makes sure that the sums hold no more than the batches that there were.

        Raises:
            CheckpointError: they do.
        """
        if self._checkpoint is not None and batches < self._restored:
            raise foreign(self._checkpoint.path, "data")

    def _interval(self) -> float:
        """Tokens between two writes."""
        assert self._checkpoint is not None
        return self._checkpoint.interval(
            self._capture.sums(),
            self._capture.modules,
            self._device.type,
            copies=self._ranks.size,
        )

    def _keep(self, batches: int) -> None:
        assert self._checkpoint is not None
        header = {
            "fingerprint": self._fingerprint,
            "batches": batches,
            "text": self._text.hexdigest(),
        }
        # The warning names the caller of calibrate, which no_grad wraps.
        write_sums(self._checkpoint.path, self._capture.sums(), header, stacklevel=6)
