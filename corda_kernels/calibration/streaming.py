"""Calibration block by block, for models whose covariances do not all fit into memory.

The hidden states between two decoder blocks are kept on the host for the whole text. Each block
runs over them once, yields the finished covariances of its layers, and leaves the hidden states
that the next one starts from. At any time there are the covariances of one block and one set of
hidden states; where a device computes, from whose memory a block may have to start again, there are
two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from corda_kernels.calibration.agreement import run_given
from corda_kernels.calibration.block_resume import BlockJournal
from corda_kernels.calibration.calibrate import Batch
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.checkpoint import CalibrationCheckpoint
from corda_kernels.calibration.covariance import CovarianceSet
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.kept_text import KeptText
from corda_kernels.calibration.recorder import unsuitable
from corda_kernels.calibration.subject import Normalize, OnUnseen, Subject, check_options
from corda_kernels.errors import CalibrationError
from corda_kernels.models import decoder_blocks
from corda_kernels.progress import progress_bar


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "all-linear",
    outlier_threshold: float = 6.0,
    normalize: Normalize = "tokens",
    on_unseen: OnUnseen = "error",
    checkpoint: CalibrationCheckpoint | None = None,
    distributed: bool = False,
    progress: bool = True,
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
        batches: see `calibrate`, as for all that is not listed here.
        targets: all of them must lie in the decoder's blocks.
        checkpoint: where to keep the sums of every finished block, and whether to go on from those
            after a kill: finished blocks then only run, and the one that was cut off starts again.
        distributed: see `calibrate`; each rank keeps the hidden states of its own batches.

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
    found = calibrate_block_parts(
        model,
        batches,
        parts=1,
        targets=targets,
        outlier_threshold=outlier_threshold,
        normalize=normalize,
        on_unseen=on_unseen,
        checkpoint=checkpoint,
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
    checkpoint: CalibrationCheckpoint | None = None,
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
    check_options(
        batches, outlier_threshold, normalize, on_unseen, checkpoint, distributed, progress
    )
    ranks = Ranks.of(distributed)
    subject = Subject.of(model, targets)
    blocks = decoder_blocks(model)
    chosen = _by_block(subject, blocks)
    ranks.agree(
        "calibrate_blocks",
        lambda: run_given(
            subject,
            batches,
            checkpoint,
            parts=parts,
            outlier_threshold=outlier_threshold,
            normalize=normalize,
            on_unseen=on_unseen,
        ),
    )
    shown = progress and ranks.rank == 0
    text = KeptText(
        subject, list(blocks.values()), batches, lambda batch: ranks.owns(batch // parts), shown
    )
    text.record()
    ranks.agree("the end of the text", text.whole.given)
    tokens = [sum(text.counts[part::parts]) for part in range(parts)]
    empty = [part for part in range(parts) if not tokens[part]]
    if empty and sum(tokens):
        raise CalibrationError(
            f"{parts} parts need text each, but part {empty[0]} has none: give more batches"
        )
    journal = BlockJournal(
        checkpoint,
        subject,
        chosen,
        text.checksum.hexdigest(),
        tokens=sum(tokens),
        parts=parts,
        outlier_threshold=outlier_threshold,
        normalize=normalize,
        ranks=ranks,
    )

    def fresh(index: int, on_host: bool = False) -> list[InputCapture]:
        return [
            InputCapture(
                chosen[index],
                outlier_threshold,
                normalize,
                deterministic=checkpoint is not None,
                on_host=on_host,
            )
            for _ in range(parts)
        ]

    last = max(index for index, linears in enumerate(chosen) if linears)

    def captured(index: int) -> list[InputCapture]:
        """The inputs of one block, over the whole text of all ranks."""
        if index >= journal.finished:
            captures = text.advance(index, functools.partial(fresh, index))
            for capture in captures:
                ranks.add_up(capture, subject.device)
            journal.keep(index, captures)
            return captures
        captures = fresh(index)
        journal.restore(index, captures)
        if index < last:
            text.advance(index)
        return captures

    def run() -> Iterator[list[CovarianceSet]]:
        bar = progress_bar(
            list(blocks)[: last + 1], description="blocks", unit="blocks", shown=shown
        )
        for index, _ in enumerate(bar):
            if not chosen[index]:
                text.advance(index)
                continue
            # No name for it: a block's covariances would be kept while the next one runs.
            yield [
                subject.result(
                    capture.covariances(),
                    capture.unseen(),
                    tokens=tokens[part],
                    normalize=normalize,
                    on_unseen=on_unseen,
                )
                for part, capture in enumerate(captured(index))
            ]

    return run()


def _by_block(subject: Subject, blocks: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """The target layers of each block, by their names in the model."""
    chosen = [
        {name: module for name, module in subject.linears.items() if name.startswith(f"{prefix}.")}
        for prefix in blocks
    ]
    outside = subject.linears.keys() - {name for linears in chosen for name in linears}
    if outside:
        raise unsuitable(f"{min(outside)} lies outside of its blocks")
    shared = [id(module) for block in blocks.values() for module in block.modules()]
    if len(set(shared)) < len(shared):
        raise unsuitable("its blocks share layers")
    return chosen
