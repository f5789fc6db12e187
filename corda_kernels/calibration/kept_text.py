"""Calibration text between two decoder blocks: hidden states on the host."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from corda_kernels.calibration.agreement import TextSum
from corda_kernels.calibration.batches import batch_digest, token_count, unpadded
from corda_kernels.calibration.calibrate import Batch, token_bar
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.recorder import HOST, Recorder, Sequences, hidden_states, unsuitable
from corda_kernels.calibration.subject import Subject, evaluating
from corda_kernels.calibration.thrift import Thrift
from corda_kernels.errors import PaddingWarning
from corda_kernels.memory import has_own_memory


class KeptText:
    """The text on its way through the blocks.

    Args:
        subject: what is calibrated.
        blocks: the decoder's.
        batches: the text.
        owned: which batches are this process's, by their number.
        shown: whether to show a progress bar.

    Attributes:
        sequences: those of the batches that are `owned`, in their order.
        counts: number of tokens in every batch.
        checksum: of the batches that are `owned`.
        whole: the sum of all batches.
    """

    def __init__(
        self,
        subject: Subject,
        blocks: list[nn.Module],
        batches: Iterable[Batch],
        owned: Callable[[int], bool],
        shown: bool,
    ) -> None:
        self._subject = subject
        self._blocks = blocks
        self._batches = batches
        self._owned = owned
        self._shown = shown
        self._thrift = Thrift(batches, subject.device)
        self.sequences: list[Sequences] = []
        self.counts: list[int] = []
        self.checksum = hashlib.sha256()
        self.whole = TextSum()

    def record(self) -> None:
        """Runs the model with blocks that pass on what they get, and notes how each was called."""
        while True:
            try:
                with evaluating(self._subject.model):
                    self._record()
                return
            except torch.OutOfMemoryError as error:
                self._tighten(error, "starting again", summing=False)

    def _record(self) -> None:
        subject = self._subject
        self.sequences, self.counts, self.checksum = [], [], hashlib.sha256()
        self.whole = TextSum()
        recorder = Recorder(self._blocks)
        with recorder.in_place_of_blocks(), token_bar(self._batches, self._shown) as bar:
            for index, batch in enumerate(self._batches):
                before = sum(self.counts)
                self.counts.append(token_count(batch))
                bar.update(self.counts[-1])
                self.whole.add(batch)
                if not self._owned(index):
                    continue
                self.checksum.update(batch_digest(batch).encode())
                for inputs in unpadded(
                    batch, index, pad_token_id=subject.pad_token_id, max_rows=self._thrift.max_rows
                ):
                    recorder.current = Sequences(index, (before, before + self.counts[-1]))
                    subject.run(inputs, index)
                    if len(recorder.current.calls) != len(self._blocks):
                        raise unsuitable("not all of its blocks ran")
                    self.sequences.append(recorder.current)

    def advance(
        self, index: int, captures_of: Callable[[bool], list[InputCapture]] | None = None
    ) -> list[InputCapture]:
        """Runs block number `index` over the text.

        Args:
            index: of the block.
            captures_of: makes fresh captures of its inputs, one for each part, whose sums are on
                the host or not; None to do without.

        Returns:
            The captures.
        """
        while True:
            captures = [] if captures_of is None else captures_of(self._thrift.on_host)
            try:
                with evaluating(self._blocks[index]):
                    self._advance(index, captures)
                return captures
            except torch.OutOfMemoryError as error:
                if not has_own_memory(self._subject.device):
                    raise
                summing = bool(captures)
                del captures  # the device needs their memory
                self._tighten(error, f"starting block {index} again", summing=summing)
            self._regroup()

    def _advance(self, index: int, captures: Sequence[InputCapture]) -> None:
        passed: list[Tensor] = []
        for position, current in enumerate(self.sequences):
            capture = captures[current.batch % len(captures)] if captures else None
            with capture or contextlib.nullcontext():
                output = current.calls[index].run(
                    self._blocks[index], current.hidden.to(self._subject.device)
                )
            hidden = hidden_states(output).to(HOST)
            if has_own_memory(self._subject.device):  # so that the block can start again
                passed.append(hidden)
            else:
                current.hidden = hidden
            following = self.sequences[position + 1 : position + 2]
            if capture and (not following or following[0].batch != current.batch):
                capture.end_pass(current.batch, current.span)
        for current, hidden in zip(self.sequences, passed, strict=False):
            current.hidden = hidden

    def _tighten(self, error: Exception, again: str, *, summing: bool) -> None:
        self._thrift.tighten(
            error,
            again=again,
            last_resort="or run on the CPU (--device cpu)",
            summing=summing,
        )

    def _regroup(self) -> None:
        """Lets fewer sequences run together, from the hidden states that they have reached."""
        reached = {
            key: torch.cat([current.hidden for current in group])
            for key, group in itertools.groupby(self.sequences, alike)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PaddingWarning)  # it was said the first time
            self.record()
        for key, group in itertools.groupby(self.sequences, alike):
            smaller = list(group)
            rows = [current.hidden.shape[0] for current in smaller]
            for current, hidden in zip(smaller, torch.split(reached[key], rows), strict=True):
                current.hidden = hidden


def alike(sequences: Sequences) -> tuple[int, int]:
    """What sequences of one batch must have in common to run together: their length."""
    return sequences.batch, sequences.hidden.shape[1]
