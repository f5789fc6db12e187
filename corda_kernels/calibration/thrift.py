"""What a calibration does about a device whose memory has run out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corda_kernels.errors import CalibrationError, OutOfMemoryWarning
from corda_kernels.memory import has_own_memory


@dataclass
class Thrift:
    """How little of a device's memory a calibration takes; less after every `tighten`.

    Attributes:
        batches: that are run.
        device: where the model runs.
        max_rows: the most sequences that run together; None for as many as a batch has.
        on_host: whether inputs are copied to the host, and summed up there.
    """

    batches: Iterable[Tensor | Mapping[str, Any]]
    device: torch.device
    max_rows: int | None = None
    on_host: bool = False

    def tighten(
        self,
        error: Exception,
        *,
        again: str,
        last_resort: str,
        summing: bool = True,
    ) -> None:
        """Half as many sequences at a time as ran out of memory, then sums on the host; it warns.

        A single sequence is tried before the host sums up, for that is slow.

        Args:
            error: that was raised.
            again: what is done now, for the warning.
            last_resort: what to do where nothing of this helps, for the error.
            summing: whether covariances were summed up when memory ran out.

        Raises:
            CalibrationError: nothing is left to be done, or the batches cannot be read a second
                time.
        """
        if not isinstance(self.batches, Sequence | Tensor):
            raise CalibrationError(
                "memory ran out while calibrating: give smaller batches, or a list of batches, "
                "which can be started again"
            ) from error
        rows = self.max_rows or max(_rows(batch) for batch in self.batches)
        if rows > 1:
            self.max_rows = rows // 2
            spared = f"at most {self.max_rows} sequence(s) at a time"
        elif summing and not self.on_host and has_own_memory(self.device):
            # Then activations may have had room enough: as many sequences as at first.
            self.on_host, self.max_rows = True, None
            spared = "covariances that the CPU sums up, which takes longer"
        else:
            raise CalibrationError(
                "memory does not suffice for a single sequence: use shorter ones (--seq-len), "
                f"{last_resort}"
            ) from error
        warnings.warn(
            f"memory ran out while calibrating: {again} with {spared}",
            OutOfMemoryWarning,
            stacklevel=4,  # the caller of calibrate, which no_grad wraps
        )


def _rows(batch: Tensor | Mapping[str, Any]) -> int:
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    return ids.shape[0] if ids.ndim == 2 else 1
