"""Calibration block by block, for models whose covariances do not all fit into memory.

The hidden states between two decoder blocks are kept on the host for the whole text. Each block
runs over them once, yields the finished covariances of its layers, and leaves the hidden states
that the next one starts from. At any time there are the covariances of one block and one set of
hidden states; where a device computes, from whose memory a block may have to start again, there are
two.

Gradients come from the other end: the text goes forwards first, and each block's input stays on the
host. Then the gradient of the loss goes back, block by block, each of which runs once more over its
inputs and yields the covariances and gradients of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.covariance_set import CovarianceSet
from corda_kernels.calibration.experts import Reader
from corda_kernels.calibration.journal import foreign
from corda_kernels.calibration.kept_text import KeptText, unsuitable
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.errors import CalibrationError
from corda_kernels.progress import progress_bar
from corda_kernels.structure import decoder_blocks, is_encoder_decoder


def calibrate_blocks(
    model: nn.Module, batches: Iterable[Batch], **options: Any
) -> Iterator[CovarianceSet]:
    """Runs the model over calibration text one decoder block at a time.

    Equivalent to `calibrate`, in pieces: the sets of all blocks together cover the same layers with
    the same numbers. Every block runs once over the text, as in one pass.

    Beside the model, memory holds the covariances of one block, and on the host the hidden states
    of the whole text in the model's dtype. If a device's memory runs out, the block starts again
    with smaller batches, in the end with sums on the host, and warns; for that the host also keeps
    the hidden states from before the block.


    Args:
        model: a transformers decoder whose blocks run one after the other; weights may be offloaded
            by accelerate.
        batches: see `calibrate`.
        options: the options of `calibrate`. All `targets` must lie in the decoder's blocks. A
            `checkpoint` keeps the sums of every finished block: a run that continues sends the text
            through these without summing, and starts the interrupted block again. With
            `distributed` each rank keeps the hidden states of its own batches. With `sides="both"`
            every block runs twice over the text: forwards, and then, from the last block to the
            first, for covariances and gradients. The inputs of all blocks are kept on the host for
            that, so it holds one copy of the text's hidden states for each block, and one more.


    Returns:
        An iterator over the covariances of each block that holds targets, in the blocks' order; in
        reverse with `sides="both"`.

    Raises:
        ConfigError, ModelError: see `calibrate`.
        TargetError: no layer matches.
        CalibrationError: there were no tokens, a batch is malformed, a target lies outside of the
            blocks or was never called, or the model does more than run its blocks in order.
        NonFiniteActivationError: a layer received NaN or Inf; raised when its block is due.
        DistributedError: another rank has ended, or was given something else.
    """
    return (sets.pop() for sets in calibrate_block_parts(model, batches, parts=1, **options))


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
    run = CalibrationRun(model, **options)
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
            f"of {parts} parts of the text, part {tokens.index(0)} is empty: give more batches"
        )
    journal, own = run.journal(), (len(counts), text.read.own())
    held = [index for index, readers in enumerate(chosen) if readers]
    order, run_block = range(held[-1] + 1), text.advance
    if run.sides == "both":
        order, run_block = range(len(blocks) - 1, held[0] - 1, -1), text.retreat
    restored = 0  # blocks, from the first in this order, whose sums need no work on any rank
    while restored < len(order) and (not chosen[order[restored]] or journal.holds(order[restored])):
        restored += 1
    restored = min(run.ranks.gather(restored, "finished blocks"))

    def finished(index: int) -> list[CovarianceSet]:
        """One block's covariances over the text of all ranks, for each part."""
        if order.index(index) < restored:
            captures = [run.capture(chosen[index]) for _ in range(parts)]
            if journal.restore(captures, index) != own:
                raise foreign(journal.file(index), "data")
            if index != order[-1]:
                run_block(index)
        else:
            captures = run_block(index, chosen[index])
            for capture in captures:
                run.ranks.add_up(capture, run.device)
            if sum(tokens) >= journal.interval(captures):
                journal.keep(captures, *own, index)
        return [run.result(*each) for each in zip(captures, tokens, strict=True)]

    def found() -> Iterator[list[CovarianceSet]]:
        shown: dict[str, Any] = {"unit": "blocks", "shown": run.shown}
        if run.sides == "both":
            for index in progress_bar(range(len(blocks)), description="blocks forwards", **shown):
                text.advance(index)
            text.turn()
        for index in progress_bar(order, description="blocks", **shown):
            if chosen[index]:
                # No name for it: a block's covariances would be kept while the next one runs.
                yield finished(index)
            else:
                run_block(index)

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
