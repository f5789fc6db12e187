"""Model and tokens in, covariances out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.agreement import TextSum, run_given
from corda_kernels.calibration.batches import token_count, unpadded
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.checkpoint import CalibrationCheckpoint
from corda_kernels.calibration.covariance import CovarianceSet
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.resume import Journal
from corda_kernels.calibration.subject import (
    Normalize,
    OnUnseen,
    Subject,
    check_options,
    evaluating,
)
from corda_kernels.calibration.thrift import Thrift
from corda_kernels.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

Batch = Tensor | Mapping[str, Any]

_ONE_PASS_REMEDY = "go block by block (--memory-limit), or run on the CPU (--device cpu)"


@torch.no_grad()
def calibrate(
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
) -> CovarianceSet:
    """Runs the model over calibration text: the covariance of every target layer's inputs.

    The model runs in eval mode without its output head; its hooks, modes and weights are as before
    afterwards, whatever happens. Layers that read the same tensor share one covariance. Sums are
    kept in float32 or better. Where a device's memory runs out, it starts again with smaller
    batches, in the end with sums on the host, and warns.

    Args:
        model: a transformers model, or any module that takes token ids.
        batches: token ids (batch, seq), or mappings with `input_ids` and `attention_mask`; padding
            never counts.
        targets: see `corda_kernels.models.target_linears`.
        outlier_threshold: |x| above which an activation is counted as an outlier, in units of x.
        normalize: "tokens" for the mean over tokens; "peft" divides each call's input by |max x|
            and takes the mean over calls, as PEFT's own CorDA does.
        on_unseen: what to do about targets that were never called: "error", or "skip" to leave them
            out.
        checkpoint: where to keep what has been summed up so far, and whether to go on from it after
            a kill. The result is the same to the last bit, interrupted or not. Each of several
            ranks keeps a file of its own, and must find it where as many ranks go on.
        distributed: whether the ranks of torch.distributed, which must all be given the same, run
            a share of the batches each; all get the same result. They compare model, batches and
            options before the first forward pass, batches that can be read but once at their end.
        progress: whether to show a progress bar with tokens per second.

    Returns:
        Covariances by module name, C = (1/n) Σ x xᵀ with x (in,) one token's input.

    Raises:
        ModelError: the model is none.
        TargetError: no layer matches.
        CalibrationError: there were no tokens, a batch is malformed, or a target was never called.
        NonFiniteActivationError: a layer received NaN or Inf.
        CheckpointError: the checkpoint to go on from is damaged, or of another run.
        DistributedError: another rank has ended, or was given something else.
        ConfigError: an option has a value that is not allowed; or `distributed` without a process
            group.

    Source: the covariance C = XXᵀ of CorDA (arXiv:2406.05223, section 3.2), scaled by 1/n.
    """
    check_options(
        batches, outlier_threshold, normalize, on_unseen, checkpoint, distributed, progress
    )
    ranks = Ranks.of(distributed)
    subject = Subject.of(model, targets)
    ranks.agree(
        "calibrate",
        lambda: run_given(
            subject,
            batches,
            checkpoint,
            outlier_threshold=outlier_threshold,
            normalize=normalize,
            on_unseen=on_unseen,
        ),
    )
    thrift = Thrift(batches, subject.device)
    while True:
        capture = InputCapture(
            subject.linears,
            outlier_threshold,
            normalize,
            deterministic=checkpoint is not None,
            on_host=thrift.on_host,
        )
        try:
            tokens, text = _accumulate(
                subject, batches, capture, checkpoint, ranks, thrift.max_rows, progress
            )
            break
        except torch.OutOfMemoryError as error:
            thrift.tighten(error, again="starting again", last_resort=_ONE_PASS_REMEDY)
    ranks.agree("the end of the text", text.given)
    ranks.add_up(capture, subject.device)
    return subject.result(
        capture.covariances(),
        capture.unseen(),
        tokens=tokens,
        normalize=normalize,
        on_unseen=on_unseen,
    )


def _accumulate(
    subject: Subject,
    batches: Iterable[Batch],
    capture: InputCapture,
    checkpoint: CalibrationCheckpoint | None,
    ranks: Ranks,
    max_rows: int | None,
    progress: bool,
) -> tuple[int, TextSum]:
    """Runs this rank's batches, `max_rows` sequences at a time; tokens and sum of all batches."""
    journal = Journal(checkpoint, capture, subject.model, subject.device, ranks)
    text = TextSum()
    batch_count = tokens = 0
    shown = progress and ranks.rank == 0
    with evaluating(subject.model), capture, token_bar(batches, shown) as bar:
        for index, batch in enumerate(batches):
            before, batch_count = tokens, index + 1
            tokens += token_count(batch)
            if ranks.size > 1:
                text.add(batch)
            if ranks.owns(index):
                journal.read(batch)
                if not journal.covers(index):
                    for inputs in unpadded(
                        batch, index, pad_token_id=subject.pad_token_id, max_rows=max_rows
                    ):
                        subject.run(inputs, index)
                    capture.end_pass(index, (before, tokens))
            bar.update(tokens - before)
            journal.end_batch(index, tokens)
        journal.end(batch_count)
    return tokens, text


def token_bar(batches: Iterable[Batch], shown: bool) -> tqdm[Any]:
    """A progress bar that counts tokens, towards a total where the batches are at hand."""
    total = None
    if isinstance(batches, Sequence) and isinstance(batches, Sized):
        total = sum(token_count(batch) for batch in batches)
    return progress_bar(
        description="calibrating", unit="tokens", shown=shown, total=total, scaled=True
    )
