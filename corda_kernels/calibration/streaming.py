"""Calibration block by block, for models whose covariances do not all fit into memory.

The hidden states between two decoder blocks are kept on the host for the whole text. Each block
runs over them once, yields the finished covariances of its layers, and leaves the hidden states
that the next one starts from. At any time there are the covariances of one block and one set of
hidden states.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import token_count, unpadded
from corda_kernels.calibration.calibrate import Batch, token_bar
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance import CovarianceSet
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.subject import Normalize, OnUnseen, Subject, evaluating
from corda_kernels.errors import CalibrationError
from corda_kernels.models import decoder_blocks
from corda_kernels.progress import progress_bar

_HOST = torch.device("cpu")


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "all-linear",
    outlier_threshold: float = 6.0,
    normalize: Normalize = "tokens",
    on_unseen: OnUnseen = "error",
    distributed: bool = False,
    progress: bool = True,
) -> Iterator[CovarianceSet]:
    """Runs the model over calibration text one decoder block at a time.

    Equivalent to `calibrate`, whose covariances come out in pieces: the sets of all blocks together
    cover the same layers with the same numbers. Every block runs once over the text, as in one
    pass.

    Beside the model there are in memory the covariances of one block and the hidden states of the
    whole text in the model's dtype, on the host.

    Args:
        model: a transformers decoder whose blocks run one after the other; weights may be offloaded
            by accelerate.
        batches: see `calibrate`.
        targets: see `calibrate`; all of them must lie in the decoder's blocks.
        outlier_threshold: see `calibrate`.
        normalize: see `calibrate`.
        on_unseen: see `calibrate`.
        distributed: see `calibrate`; each rank keeps the hidden states of its own batches.
        progress: whether to show a progress bar.

    Returns:
        An iterator over the blocks that hold targets, in their order.

    Raises:
        TargetError: no layer matches.
        CalibrationError: there were no tokens, a batch is malformed, a target lies outside of the
            blocks or was never called, or the model does more than run its blocks in order.
        NonFiniteActivationError: a layer received NaN or Inf; raised when its block is due.
    """
    found = calibrate_block_parts(
        model,
        batches,
        parts=1,
        targets=targets,
        outlier_threshold=outlier_threshold,
        normalize=normalize,
        on_unseen=on_unseen,
        distributed=distributed,
        progress=progress,
    )
    return (sets.pop() for sets in found)


@torch.no_grad()
def calibrate_block_parts(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    parts: int,
    targets: str | Sequence[str] = "all-linear",
    outlier_threshold: float = 6.0,
    normalize: Normalize = "tokens",
    on_unseen: OnUnseen = "error",
    distributed: bool = False,
    progress: bool = True,
) -> Iterator[list[CovarianceSet]]:
    """As `calibrate_blocks`, with the text in `parts`: batch i belongs to part i modulo `parts`.

    Returns:
        An iterator over the blocks that hold targets, in their order: for each a list with the set
        of every part.

    Raises:
        CalibrationError: a part has no text; see also `calibrate_blocks`.
    """
    ranks = Ranks.of(distributed)
    subject = Subject.of(model, targets)
    blocks = decoder_blocks(model)
    chosen = _by_block(subject, blocks)
    shown = progress and ranks.rank == 0
    with evaluating(model):
        sequences, counts = _record(
            subject, blocks, batches, lambda batch: ranks.owns(batch // parts), shown
        )
    tokens = [sum(counts[part::parts]) for part in range(parts)]
    empty = [part for part in range(parts) if not tokens[part]]
    if empty and sum(tokens):
        raise CalibrationError(
            f"{parts} parts need text each, but part {empty[0]} has none: give more batches"
        )

    def run() -> Iterator[list[CovarianceSet]]:
        last = max(index for index, linears in enumerate(chosen) if linears)
        bar = progress_bar(
            list(blocks.values())[: last + 1], description="blocks", unit="blocks", shown=shown
        )
        for index, block in enumerate(bar):
            captures = [
                InputCapture(chosen[index], outlier_threshold, normalize) for _ in range(parts)
            ]
            with evaluating(block):
                _advance(block, index, sequences, captures, subject.device, ranks)
            if chosen[index]:
                yield [
                    subject.result(
                        capture.covariances(),
                        capture.unseen(),
                        tokens=tokens[part],
                        normalize=normalize,
                        on_unseen=on_unseen,
                    )
                    for part, capture in enumerate(captures)
                ]

    return run()


@dataclass
class _Sequences:
    """Sequences of equal length that run together, on their way through the blocks.

    Attributes:
        batch: number of the batch that they come from.
        span: range of that batch's tokens in the text.
        hidden: what the next block reads, on the host.
        calls: what each block is called with besides the hidden states.
    """

    batch: int
    span: tuple[int, int]
    hidden: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """Arguments of a block, less the hidden states, which come first or by this name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """What the block returns."""
        if self.name is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.name: hidden}, **self.kwargs)


def _hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block returned: a tensor, or a tuple that has nothing else."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        first, *others = output
        if isinstance(first, Tensor) and not any(isinstance(other, Tensor) for other in others):
            return first
    raise _unsuitable("its blocks return more than hidden states")


def _unsuitable(reason: str) -> CalibrationError:
    return CalibrationError(
        f"the model cannot be calibrated block by block, for {reason}: calibrate it in one pass"
    )


def _by_block(subject: Subject, blocks: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """The target layers of each block, by their names in the model."""
    chosen = [
        {name: module for name, module in subject.linears.items() if name.startswith(f"{prefix}.")}
        for prefix in blocks
    ]
    outside = subject.linears.keys() - {name for linears in chosen for name in linears}
    if outside:
        raise _unsuitable(f"{min(outside)} lies outside of its blocks")
    shared = [id(module) for block in blocks.values() for module in block.modules()]
    if len(set(shared)) < len(shared):
        raise _unsuitable("its blocks share layers")
    return chosen


def _record(
    subject: Subject,
    blocks: dict[str, nn.Module],
    batches: Iterable[Batch],
    owned: Callable[[int], bool],
    shown: bool,
) -> tuple[list[_Sequences], list[int]]:
    """Runs the model with blocks that pass on what they get, and notes how each was called.

    Returns the sequences of the batches that are `owned`, and the number of tokens in every batch.
    """
    sequences: list[_Sequences] = []
    counts: list[int] = []
    recorder = _Recorder(list(blocks.values()))
    with recorder.in_place_of_blocks(), token_bar(batches, shown) as bar:
        for index, batch in enumerate(batches):
            before = sum(counts)
            counts.append(token_count(batch))
            bar.update(counts[-1])
            if not owned(index):
                continue
            for inputs in unpadded(batch, index, pad_token_id=subject.pad_token_id):
                recorder.current = _Sequences(index, (before, before + counts[-1]))
                subject.run(inputs)
                if len(recorder.current.calls) != len(blocks):
                    raise _unsuitable("not all of its blocks ran")
                sequences.append(recorder.current)
    return sequences, counts


@dataclass
class _Recorder:
    """Stands in for every block: passes the hidden states on, and notes the other arguments."""

    blocks: list[nn.Module]
    current: _Sequences | None = None
    _passed: Tensor | None = None
    _tuple: bool | None = None  # whether blocks return one
    _seen: dict[tuple[Any, ...], deque[Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def in_place_of_blocks(self) -> Iterator[None]:
        """Replaces the forward methods, below the hooks of accelerate, which would load weights."""
        own = [vars(block).get("forward") for block in self.blocks]
        originals = [block.forward for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                vars(block)["forward"] = self._stand_in(index, originals[index])
            yield
        finally:
            for block, before in zip(self.blocks, own, strict=True):
                if before is None:
                    del vars(block)["forward"]
                else:
                    vars(block)["forward"] = before

    def _stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self.current is not None
            name = None if args else "hidden_states"
            if name is not None and name not in kwargs:
                raise _unsuitable(f"its blocks are called without {name}")
            hidden = args[0] if name is None else kwargs.pop(name)
            if len(self.current.calls) != index:
                raise _unsuitable("its blocks do not run once each in their order")
            if index == 0:
                self.current.hidden = hidden.to(_HOST)
            elif hidden is not self._passed:
                raise _unsuitable("something happens to the hidden states between its blocks")
            call = _Call(self._kept(args[1:]), self._kept(kwargs), name)
            self.current.calls.append(call)
            self._passed = hidden
            if self._tuple is None:
                output = call.run(original, hidden.clone())
                _hidden_states(output)
                self._tuple = isinstance(output, tuple)
            return (hidden,) if self._tuple else hidden

        return forward

    def _kept(self, value: Any) -> Any:
        """The same arguments, with one tensor for all that are equal.

        Masks and rotary embeddings are the same for all blocks and for all texts of one length.
        """
        if isinstance(value, Tensor):
            known = self._seen.setdefault((value.shape, value.dtype, value.device), deque(maxlen=8))
            for tensor in known:
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            known.append(value)
            return value
        if isinstance(value, tuple | list):
            return type(value)(self._kept(entry) for entry in value)
        if isinstance(value, dict):
            return {name: self._kept(entry) for name, entry in value.items()}
        return value


def _advance(
    block: nn.Module,
    index: int,
    sequences: Sequence[_Sequences],
    captures: Sequence[InputCapture],
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Runs block number `index` over the whole text, on all ranks."""
    for position, current in enumerate(sequences):
        assert current.hidden is not None
        capture = captures[current.batch % len(captures)]
        with capture:
            output = current.calls[index].run(block, current.hidden.to(device))
        current.hidden = _hidden_states(output).to(_HOST)
        following = sequences[position + 1 : position + 2]
        if not following or following[0].batch != current.batch:
            capture.end_pass(current.batch, current.span)
    for capture in captures:
        ranks.add_up(capture)
