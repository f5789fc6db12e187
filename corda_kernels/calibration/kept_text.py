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
from corda_kernels.calibration.capture import HOST, InputCapture
from corda_kernels.calibration.experts import Reader, one_by_one, replaced_forward
from corda_kernels.calibration.forward import evaluating
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import CalibrationError, PaddingWarning
from corda_kernels.memory import has_own_memory


@dataclass
class KeptText:
    """The text on its way through the blocks, as hidden states on the host.

    Where gradients are taken, each block's input stays, and once the text has come to its end the
    gradient of its loss goes the same way back.

    Attributes:
        run: what is calibrated.
        blocks: the decoder's.
        batches: the text.
        parts: into which the text is dealt out.
        sequences: those of this rank's batches, in their order.
        recorder: that stood in for the blocks.
        read: what the batches held.
    """

    run: CalibrationRun
    blocks: list[nn.Module]
    batches: Iterable[Batch]
    parts: int = 1
    sequences: list[Sequences] = field(default_factory=list, init=False)
    recorder: Recorder = field(init=False)
    read: TextSum = field(default_factory=TextSum, init=False)
    _rows: int | None = field(default=None, init=False)  # as many at most were recorded together

    def record(self) -> None:
        """Runs the model with blocks that pass on what they get, and notes how each was called."""
        self.run.retry(self.batches, self._record, "starting again", summing=False)

    def _record(self) -> None:
        run, self._rows = self.run, self.run.max_rows
        self.sequences, self.read = [], TextSum()
        recorder = self.recorder = Recorder(self.blocks)
        reads = contextlib.closing(run.read(self.batches, self.read, self.parts))
        with evaluating(run.model), recorder.in_place_of_blocks(), reads as numbered:
            for index, batch, own in numbered:
                span = self.read.span
                pieces = run.forward.pieces(batch, index, span) if own else ()
                for inputs, rows in run.together(pieces):
                    if not bool(torch.as_tensor(inputs.get("attention_mask", True)).all()):
                        raise unsuitable("text beside other inputs is padded")
                    counted = inputs.pop("token_mask", None)
                    recorder.current = Sequences(index, span, inputs, counted)
                    try:
                        run.forward(inputs, rows, follow=False)
                    except torch.OutOfMemoryError:
                        raise
                    except RuntimeError as error:
                        says = "its blocks change the shape of what they read"
                        raise unsuitable(says) from error
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

        def step(current: Sequences) -> list[Tensor]:
            output = self._block(index, current, current.states[-1])
            kept = current.states if self.run.sides == "both" else []
            return [*kept, output.to(HOST)]

        return self._stepped(step, self.blocks[index], f"starting block {index} again", readers)

    def turn(self) -> None:
        """Replaces the last hidden states by the gradients of the summed losses at them."""

        def step(current: Sequences) -> list[Tensor]:
            *inputs, hidden = current.states
            leaf = self.recorder.final = self._leaf(hidden)
            with self.recorder.in_place_of_blocks():
                self.run.forward(current.inputs, [current.batch] * len(hidden))
            self.recorder.final = None
            return [*inputs, _gradient(leaf)]

        self._stepped(step, self.run.model, "starting the head again")

    def retreat(
        self, index: int, readers: Mapping[str, Reader] | None = None
    ) -> list[InputCapture]:
        """Runs block number `index` over its inputs once more, and gradients back through it.

        Args:
            index: of the block, the last one that they have not passed.
            readers: as in `advance`; of them also the gradients are summed up.

        Returns:
            Their sums, for each part of the text.
        """

        def step(current: Sequences) -> list[Tensor]:
            *others, hidden, gradient = current.states
            leaf = self._leaf(hidden)
            with torch.enable_grad():
                output = self._block(index, current, leaf.clone())
                output.backward(gradient.to(output.device))  # type: ignore[no-untyped-call]
            return [*others, _gradient(leaf)]

        return self._stepped(step, self.blocks[index], f"starting block {index} again", readers)

    def _block(self, index: int, current: Sequences, hidden: Tensor) -> Tensor:
        args, kwargs = current.calls[index]
        return hidden_states(self.blocks[index](hidden.to(self.run.device), *args, **kwargs))

    def _leaf(self, hidden: Tensor) -> Tensor:
        return hidden.detach().to(self.run.device).requires_grad_()

    def _stepped(
        self,
        step: Callable[[Sequences], list[Tensor]],
        module: nn.Module,
        again: str,
        readers: Mapping[str, Reader] | None = None,
    ) -> list[InputCapture]:
        """Gives all sequences the states that `step` makes by running `module`; the sums."""
        run = self.run

        def attempt() -> list[InputCapture]:
            if self._rows != run.max_rows:
                self._regroup()
            captures = [run.capture(readers or {}) for _ in range(self.parts)]
            with evaluating(module), one_by_one(run.experts_modules):
                self._step(step, captures)
            return captures

        if not has_own_memory(run.device):
            return attempt()
        return run.retry(self.batches, attempt, again, summing=readers is not None)

    def _step(
        self, step: Callable[[Sequences], list[Tensor]], captures: Sequence[InputCapture]
    ) -> None:
        passed: list[list[Tensor]] = []
        for batch, group in itertools.groupby(self.sequences, lambda current: current.batch):
            capture = captures[batch % self.parts]
            with capture:
                for current in group:
                    capture.begin_rows(current.counted)
                    states = step(current)
                    if has_own_memory(self.run.device):  # so that the step can start again
                        passed.append(states)
                    else:
                        current.states = states
            capture.end_pass(batch, current.span)
        for current, states in zip(self.sequences, passed, strict=False):
            current.states = states

    def _regroup(self) -> None:
        """Lets as many sequences run together as memory holds, from the states they have reached.

        Those of one length in one batch were together at first.
        """
        reached = {}
        for key, group in itertools.groupby(self.sequences, alike):
            alike_states = zip(*(current.states for current in group), strict=True)
            reached[key] = [torch.cat(states) for states in alike_states]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PaddingWarning)  # it was said the first time
            self.record()
        for key, group in itertools.groupby(self.sequences, alike):
            smaller = list(group)
            rows = [len(current.states[-1]) for current in smaller]
            parts = [torch.split(states, rows) for states in reached[key]]
            for number, current in enumerate(smaller):
                current.states = [part[number] for part in parts]


def alike(sequences: Sequences) -> tuple[int, int]:
    """What sequences of one batch must have in common to run together: their length."""
    return sequences.batch, sequences.states[-1].shape[1]


@dataclass
class Sequences:
    """Sequences of equal length that run together, on their way through the blocks.

    Attributes:
        batch: number of the batch that they come from.
        span: range of that batch's tokens in the text.
        inputs: what the model was given.
        counted: (batch, seq) of ones and zeros, the tokens that count; None for all.
        states: (batch, seq, hidden) each, on the host: the last is what the next block reads, or
            on the way back the gradient at the output of the one that is next; before it, where
            gradients are taken, the inputs of all blocks up to there.
        calls: positional and named arguments of each block, without the hidden states.
    """

    batch: int
    span: tuple[int, int]
    inputs: dict[str, Any]
    counted: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad.to(HOST)


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block returned: a tensor, or a tuple's first entry."""
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor):
        return first
    raise unsuitable("its blocks do not return hidden states first")


def unsuitable(
    reason: str, remedy: str = "calibrate it in one pass, without a memory limit"
) -> CalibrationError:
    """The error for a model that does more than run its blocks in order."""
    return CalibrationError(
        f"the model cannot be calibrated block by block, because {reason}: {remedy}"
    )


@dataclass
class Recorder:
    """Stands in for every block: passes the hidden states on, and notes the other arguments.

    Attributes:
        blocks: the decoder's.
        current: the sequences whose arguments are noted.
        final: hidden states to return from every block, so that only what follows the last one
            counts, in place of noting anything.
    """

    blocks: list[nn.Module]
    current: Sequences | None = None
    final: Tensor | None = None
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
                restored.enter_context(replaced_forward(block, stand_in))
            yield

    def _stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.final is not None:
                return self._returned(self.final.clone())
            assert self.current is not None
            if not args and "hidden_states" not in kwargs:
                raise unsuitable("its blocks are called without hidden_states")
            hidden, *others = args or (kwargs.pop("hidden_states"),)
            if len(self.current.calls) != index:
                raise unsuitable("its blocks do not run once each in their order")
            if index == 0:
                self.current.states = [hidden.to(HOST)]
            elif hidden is not self._passed:
                raise unsuitable("something happens to the hidden states between its blocks")
            self.current.calls.append(tree_map_only(Tensor, self._kept, (tuple(others), kwargs)))
            self._passed = hidden
            if not self._asked:
                output = original(hidden.clone(), *others, **kwargs)
                hidden_states(output)
                self._asked = True
                if isinstance(output, tuple):  # such as attention weights, which no block may read
                    self._rest = tree_map_only(Tensor, _unread, output[1:])
            return self._returned(hidden)

        return forward

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._rest is None else (hidden, *self._rest)

    def _kept(self, value: Tensor) -> Tensor:
        """The same tensor for all that are equal.

        Masks and rotary embeddings are the same for all blocks and for all texts of one length.
        """
        if value.is_floating_point() and bool(value.isnan().any()):
            raise unsuitable("its blocks read more of each other than hidden states")
        known = self._seen.setdefault((value.shape, value.dtype, value.device), deque(maxlen=8))
        for tensor in known:
            if tensor is value or torch.equal(tensor, value):
                return tensor
        known.append(value)
        return value


def _unread(value: Tensor) -> Tensor:
    """Stands for a tensor that nothing may be made of: NaN shows where something is."""
    if not value.is_floating_point():
        raise unsuitable("its blocks return whole numbers beside hidden states")
    return torch.full_like(value, torch.nan)
