"""Block-by-block calibration that survives a kill: a finished block's sums are kept in a file.

A run that goes on reads the sums of the blocks that were finished and only sends the hidden states
through them, which costs their forward pass and no products; the hidden states themselves, far
larger than the sums on a long text, are never written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

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
from corda_kernels.calibration.subject import Subject
from corda_kernels.fields import is_text, is_whole


class BlockJournal:
    """Keeps the sums of finished decoder blocks, or restores them.

    Several ranks each keep the sums over all of them, and go on behind the last block that every
    one of them has kept.

    Args:
        checkpoint: where to; None for nowhere.
        subject: what is calibrated.
        blocks: the target layers of each block.
        text: checksum of this rank's share of the text.
        tokens: of the whole text.
        parts: in which the text is.
        outlier_threshold: see `calibrate`.
        normalize: see `calibrate`.
        ranks: that share the text.

    Attributes:
        finished: number of blocks, from the first, whose sums need no work.

    Raises:
        CheckpointError: the files to go on from are of a run in one pass, or of other ranks.
        DistributedError: another rank has ended.
    """

    def __init__(
        self,
        checkpoint: CalibrationCheckpoint | None,
        subject: Subject,
        blocks: Sequence[Mapping[str, nn.Module]],
        text: str,
        *,
        tokens: int,
        parts: int,
        outlier_threshold: float,
        normalize: str,
        ranks: Ranks,
    ) -> None:
        self._checkpoint = checkpoint
        self._blocks = blocks
        self._device = subject.device
        self._text = text
        self._tokens = tokens
        self._parts = parts
        self._ranks = ranks
        self.finished = 0
        if checkpoint is None:
            return
        checkpoint.of_rank(ranks)  # refuses what other ranks have left
        self._fingerprint = fingerprint(
            subject.model,
            subject.linears,
            subject.device,
            outlier_threshold=outlier_threshold,
            normalize=normalize,
            ranks=ranks,
        )
        if checkpoint.resume:
            while self.finished < len(blocks) and (
                not blocks[self.finished] or self._file(self.finished).exists()
            ):
                self.finished += 1
            self.finished = min(ranks.gather(self.finished, "finished blocks"))

    def _file(self, block: int) -> Path:
        assert self._checkpoint is not None
        return Path(self._checkpoint.block(block).of_rank(self._ranks).path)

    def keep(self, block: int, captures: Sequence[InputCapture]) -> None:
        """Keeps a block's sums over the whole text, those of every part, if that pays."""
        sums = [capture.sums() for capture in captures]
        if self._checkpoint is None or self._tokens < self._checkpoint.interval(
            sums[0],
            self._blocks[block],
            self._device.type,
            copies=self._parts * self._ranks.size,
        ):
            return
        header = {
            "fingerprint": self._fingerprint,
            "text": self._text,
            "parts": [len(groups) for groups in sums],
        }
        groups = [group for part in sums for group in part]
        write_sums(self._file(block), groups, header, stacklevel=2)

    def restore(self, block: int, captures: Sequence[InputCapture]) -> None:
        """Takes up the sums of a finished block.

        Raises:
            CheckpointError: its file is damaged, or of another model, text or options.
        """
        file = self._file(block)
        values, groups = read_sums(
            file,
            self._fingerprint,
            self._blocks[block],
            {
                "text": is_text,
                "parts": lambda value: isinstance(value, list) and all(map(is_whole, value)),
            },
            device=_computing_device(self._blocks[block], self._device),
        )
        if values["text"] != self._text:
            raise foreign(file, "data")
        counts = values["parts"]
        if len(counts) != len(captures) or sum(counts) != len(groups):
            raise foreign(file, "stability")
        for capture, count in zip(captures, counts, strict=True):
            check_distinct(file, groups[:count])
            capture.restore(groups[:count])
            groups = groups[count:]


def _computing_device(linears: Mapping[str, nn.Module], otherwise: torch.device) -> torch.device:
    """Where a block's inputs come from, and hence its sums are: not where its weights wait."""
    device = next(next(iter(linears.values())).parameters()).device
    return otherwise if device.type == "meta" else device
