"""Calibration block by block, for models whose covariances do not all fit into memory.

The hidden states between two decoder blocks are kept on the host for the whole text. Each block
runs over them once, yields the finished covariances of its layers, and leaves the hidden states
that the next one starts from. At any time there are the covariances of one block and one set of
hidden states; where a device computes, from whose memory a block may have to start again, there are
two.
"""

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
from corda_kernels.calibration.covariance_set import CovarianceSet
from corda_kernels.calibration.experts import Reader, one_by_one
from corda_kernels.calibration.forward import evaluating
from corda_kernels.calibration.journal import foreign
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import CalibrationError, ConfigError, PaddingWarning
from corda_kernels.memory import has_own_memory
from corda_kernels.progress import progress_bar
from corda_kernels.structure import decoder_blocks, is_encoder_decoder

_HOST = torch.device("cpu")


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    batches: Iterable[Batch],
    **options: Any,
) -> Iterator[CovarianceSet]:
    """Runs the model over calibration text one decoder block at a time.

    Equivalent to `calibrate`, whose covariances come out in pieces: the sets of all blocks together
    cover the same layers with the same numbers. Every block runs once over the text, as in one
    pass.

    Beside the model there are in memory the covariances of one block and the hidden states of the
    whole text in the model's dtype, on the host. Where a device's memory runs out, the block starts
    again with smaller batches, in the end with sums on the host, and warns; for that the host keeps
    the hidden states from before the block as well.

    Args:
        model: a transformers decoder whose blocks run one after the other; weights may be offloaded
            by accelerate.
        batches: see `calibrate`.
        options: those of `calibrate` but `sides` and `labels`. All `targets` must lie in the
            decoder's blocks. A `checkpoint` keeps the sums of every finished block; after a kill
            finished blocks only run, and the one that was cut off starts again. With `distributed`
            each rank keeps the hidden states of its own batches.

    Returns:
        An iterator over the blocks that hold targets, in their order.

    Raises:
        ConfigError: see `calibrate`, as for ModelError.
        TargetError: no layer matches.
        CalibrationError: there were no tokens, a batch is malformed, a target lies outside of the
            blocks or was never called, or the model does more than run its blocks in order.
        NonFiniteActivationError: a layer received NaN or Inf; raised when its block is due.
        DistributedError: another rank has ended, or was given something else.
    """
    run = CalibrationRun(model, **options)
    return (sets.pop() for sets in _calibrated(run, batches, parts=1))


@torch.no_grad()
def calibrate_block_parts(
    model: nn.Module, batches: Iterable[Batch], *, parts: int, **options: Any
) -> Iterator[list[CovarianceSet]]:
    """As `calibrate_blocks`, with the text in `parts`: batch i belongs to part i modulo `parts`.

    Args:
        model: see `calibrate_blocks`.
        batches: the text.
        parts: how many.
        options: all further ones of `calibrate_blocks`.

    Returns:
        An iterator over the blocks that hold targets, in their order: for each a list with the set
        of every part.

    Raises:
        CalibrationError: a part has no text; see also `calibrate_blocks`.
    """
    return _calibrated(CalibrationRun(model, **options), batches, parts)


def _calibrated(
    run: CalibrationRun, batches: Iterable[Batch], parts: int
) -> Iterator[list[CovarianceSet]]:
    """See `calibrate_block_parts`; all but the blocks' own passes is done before it returns."""
    if run.sides == "both":
        raise ConfigError('sides="both" takes gradients in one pass: use calibrate')
    if is_encoder_decoder(run.model):
        raise unsuitable("its decoder's blocks read the encoder's states too")
    blocks = decoder_blocks(run.model)
    chosen = _by_block(run, blocks)
    run.agree("calibrate_blocks", batches, parts=parts)
    text = KeptText(run, list(blocks.values()), batches, parts)
    text.record()
    run.ranks.agree("the end of the text", text.read.given)
    counts = text.read.counts
    tokens = [sum(counts[part::parts]) for part in range(parts)]
    if sum(tokens) and not all(tokens):
        raise CalibrationError(
            f"{parts} parts need text each, but part {tokens.index(0)} has none: give more batches"
        )
    journal, own = run.journal(), (len(counts), text.read.own())
    restored = 0  # blocks, from the first, whose sums need no work on any rank
    while restored < len(chosen) and (not chosen[restored] or journal.holds(restored)):
        restored += 1
    restored = min(run.ranks.gather(restored, "finished blocks"))
    last = max(index for index, readers in enumerate(chosen) if readers)

    def finished(index: int) -> list[CovarianceSet]:
        """One block's covariances over the text of all ranks, for each part."""
        if index < restored:
            captures = [run.capture(chosen[index]) for _ in range(parts)]
            if journal.restore(captures, index) != own:
                raise foreign(journal.file(index), "data")
            if index < last:
                text.advance(index)
        else:
            captures = text.advance(index, chosen[index])
            for capture in captures:
                run.ranks.add_up(capture, run.device)
            if sum(tokens) >= journal.interval(captures):
                journal.keep(captures, *own, index)
        return [run.result(*each) for each in zip(captures, tokens, strict=True)]

    def found() -> Iterator[list[CovarianceSet]]:
        bar = progress_bar(range(last + 1), description="blocks", unit="blocks", shown=run.shown)
        for index in bar:
            if chosen[index]:
                # No name for it: a block's covariances would be kept while the next one runs.
                yield finished(index)
            else:
                text.advance(index)

    return found()


def _by_block(run: CalibrationRun, blocks: dict[str, nn.Module]) -> list[dict[str, Reader]]:
    """The targets of each block, by the names of their covariances."""
    chosen = [
        {name: reader for name, reader in run.readers.items() if name.startswith(f"{prefix}.")}
        for prefix in blocks
    ]
    outside = run.readers.keys() - {name for readers in chosen for name in readers}
    if outside:
        remedy = "leave that out of the targets, or calibrate it in one pass"
        raise unsuitable(f"{min(outside)} lies outside of its blocks", remedy)
    shared = [id(module) for block in blocks.values() for module in block.modules()]
    if len(set(shared)) < len(shared):
        raise unsuitable("its blocks share layers")
    return chosen


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
                span = self.read.span
                pieces = run.forward.pieces(batch, index, span) if own else ()
                for inputs, rows in run.together(pieces):
                    if not bool(torch.as_tensor(inputs.get("attention_mask", True)).all()):
                        raise unsuitable("text beside other inputs is padded")
                    counted = inputs.pop("token_mask", None)
                    recorder.current = Sequences(index, span, counted)
                    try:
                        run.forward(inputs, rows)
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
    """The hidden states in what a block returned: a tensor, or a tuple's first entry."""
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor):
        return first
    raise unsuitable("its blocks do not return hidden states first")


def unsuitable(reason: str, remedy: str = "calibrate it in one pass") -> CalibrationError:
    """The error for a model that does more than run its blocks in order."""
    return CalibrationError(
        f"the model cannot be calibrated block by block, because {reason}: {remedy}"
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
                if isinstance(output, tuple):  # such as attention weights, which no block may read
                    self._rest = tree_map_only(Tensor, _unread, output[1:])
            return hidden if self._rest is None else (hidden, *self._rest)

        return forward

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
