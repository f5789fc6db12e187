"""A text on its way through a model's decoder blocks, as hidden states on the host."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from corda_kernels.calibration.batches import Batch, TextSum
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.experts import Reader, one_by_one
from corda_kernels.calibration.forward import evaluating
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import CalibrationError, PaddingWarning
from corda_kernels.memory import has_own_memory

_HOST = torch.device("cpu")


@dataclass
class KeptText:
    """The text on its way through the blocks, as hidden states on the host.

    Attributes:
        run: what is calibrated.
        blocks: the decoder's.
        batches: the text.
        parts: into which the text is dealt out.
        sequences: those of this rank's batches, in their order.
        read: what the batches held.
    """

    run: CalibrationRun
    blocks: list[nn.Module]
    batches: Iterable[Batch]
    parts: int = 1
    sequences: list[Sequences] = field(default_factory=list, init=False)
    read: TextSum = field(default_factory=TextSum, init=False)
    _rows: int | None = field(default=None, init=False)  # as many at most were recorded together

    def record(self) -> None:
        """Runs the model with blocks that pass on what they get, and notes how each was called."""
        self.run.retry(self.batches, self._record, "starting again", summing=False)

    def _record(self) -> None:
        run, self._rows = self.run, self.run.max_rows
        self.sequences, self.read = [], TextSum()
        recorder = Recorder(self.blocks)
        reads = contextlib.closing(run.read(self.batches, self.read, self.parts))
        with evaluating(run.model), recorder.in_place_of_blocks(), reads as numbered:
            for index, batch, own in numbered:
                for inputs in run.forward.sequences(batch, index, run.max_rows) if own else ():
                    if not bool(torch.as_tensor(inputs.get("attention_mask", True)).all()):
                        raise unsuitable("text beside other inputs is padded")
                    counted = inputs.pop("token_mask", None)
                    recorder.current = Sequences(index, self.read.span, counted)
                    run.forward(inputs, index)
                    if len(recorder.current.calls) != len(self.blocks):
                        raise unsuitable("not all of its blocks ran")
                    self.sequences.append(recorder.current)

    def advance(
        self, index: int, readers: Mapping[str, Reader] | None = None
    ) -> list[InputCapture]:
        """Runs block number `index` over the text.

        Args:
            index: of the block.
            readers: the targets whose inputs are summed up; None for none.

        Returns:
            Their sums, for each part of the text.
        """

        run = self.run

        def attempt() -> list[InputCapture]:
            if self._rows != run.max_rows:
                self._regroup()
            captures = [run.capture(readers or {}) for _ in range(self.parts)]
            with evaluating(self.blocks[index]), one_by_one(run.experts_modules):
                self._advance(index, captures)
            return captures

        if not has_own_memory(run.device):
            return attempt()
        again = f"starting block {index} again"
        return run.retry(self.batches, attempt, again, summing=readers is not None)

    def _advance(self, index: int, captures: Sequence[InputCapture]) -> None:
        passed: list[Tensor] = []
        for batch, group in itertools.groupby(self.sequences, lambda current: current.batch):
            capture = captures[batch % self.parts]
            with capture:
                for current in group:
                    capture.begin_rows(current.counted)
                    args, kwargs = current.calls[index]
                    hidden = current.hidden.to(self.run.device)
                    output = self.blocks[index](hidden, *args, **kwargs)
                    hidden = hidden_states(output).to(_HOST)
                    if has_own_memory(self.run.device):  # so that the block can start again
                        passed.append(hidden)
                    else:
                        current.hidden = hidden
            capture.end_pass(batch, current.span)
        for current, hidden in zip(self.sequences, passed, strict=False):
            current.hidden = hidden

    def _regroup(self) -> None:
        """Lets as many sequences run together as memory holds, from the states they have reached.

        Those of one length in one batch were together at first.
        """
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


@dataclass
class Sequences:
    """Sequences of equal length that run together, on their way through the blocks.

    Attributes:
        batch: number of the batch that they come from.
        span: range of that batch's tokens in the text.
        counted: (batch, seq) of ones and zeros, the tokens that count; None for all.
        hidden: what the next block reads, on the host.
        calls: positional and named arguments of each block, without the hidden states.
    """

    batch: int
    span: tuple[int, int]
    counted: Tensor | None = None
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block returned: a tensor, or a tuple that has nothing else."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        first, *others = output
        if isinstance(first, Tensor) and not any(isinstance(other, Tensor) for other in others):
            return first
    raise unsuitable("its blocks return more than hidden states")


def unsuitable(reason: str) -> CalibrationError:
    """The error for a model that does more than run its blocks in order."""
    return CalibrationError(
        f"the model cannot be calibrated block by block, because {reason}: calibrate it in one pass"
    )


@dataclass
class Recorder:
    """Stands in for every block: passes the hidden states on, and notes the other arguments."""

    blocks: list[nn.Module]
    current: Sequences | None = None
    _passed: Tensor | None = None
    _asked: bool = False  # what blocks return
    _rest: tuple[Any, ...] | None = None  # what they return beside hidden states, if in a tuple
    _seen: dict[tuple[Any, ...], deque[Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def in_place_of_blocks(self) -> Iterator[None]:
        """Replaces the forward methods, below the hooks of accelerate, which would load weights."""
        with contextlib.ExitStack() as restored:
            for index, block in enumerate(self.blocks):
                stand_in = self._stand_in(index, block.forward)
                if "forward" in vars(block):
                    restored.callback(vars(block).update, forward=block.forward)
                else:
                    restored.callback(vars(block).pop, "forward")
                vars(block)["forward"] = stand_in
            yield

    def _stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self.current is not None
            if not args and "hidden_states" not in kwargs:
                raise unsuitable("its blocks are called without hidden_states")
            hidden, *others = args or (kwargs.pop("hidden_states"),)
            if len(self.current.calls) != index:
                raise unsuitable("its blocks do not run once each in their order")
            if index == 0:
                self.current.hidden = hidden.to(_HOST)
            elif hidden is not self._passed:
                raise unsuitable("something happens to the hidden states between its blocks")
            self.current.calls.append(tree_map_only(Tensor, self._kept, (tuple(others), kwargs)))
            self._passed = hidden
            if not self._asked:
                output = original(hidden.clone(), *others, **kwargs)
                hidden_states(output)
                self._asked = True
                self._rest = output[1:] if isinstance(output, tuple) else None
            return hidden if self._rest is None else (hidden, *self._rest)

        return forward

    def _kept(self, value: Tensor) -> Tensor:
        """The same tensor for all that are equal.

        Masks and rotary embeddings are the same for all blocks and for all texts of one length.
        """
        known = self._seen.setdefault((value.shape, value.dtype, value.device), deque(maxlen=8))
        for tensor in known:
            if tensor is value or torch.equal(tensor, value):
                return tensor
        known.append(value)
        return value
