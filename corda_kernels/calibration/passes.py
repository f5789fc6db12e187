"""Model and tokens in, covariances out, in one pass."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from corda_kernels.calibration.batches import Batch, Piece, TextSum
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance_set import CovarianceSet
from corda_kernels.calibration.experts import Experts
from corda_kernels.calibration.forward import evaluating
from corda_kernels.calibration.gradients import Labels, Sides
from corda_kernels.calibration.journal import CalibrationCheckpoint, foreign
from corda_kernels.calibration.masks import RowMasks
from corda_kernels.calibration.run import CalibrationRun, Normalize, OnUnseen, Targets
from corda_kernels.calibration.watched import Watch
from corda_kernels.errors import BatchError, ConfigError, NonFiniteActivationError


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | Callable[[], object],
    *,
    targets: Targets = None,
    experts: Experts | None = None,
    outlier_threshold: float = 6.0,
    normalize: Normalize = "tokens",
    on_unseen: OnUnseen = "error",
    checkpoint: CalibrationCheckpoint | None = None,
    distributed: bool = False,
    progress: bool = True,
    sides: Sides = "inputs",
    labels: Labels = "given",
) -> CovarianceSet:
    """Runs the model over calibration data and returns the covariance of each layer's inputs.

    The model runs in eval mode, on text without its output head. Afterwards its hooks, modes and
    weights are as before, also after an error. Layers that read the same tensor share one
    covariance. Sums are kept in float32 or better. If a device's memory runs out, calibration
    starts again with smaller batches, in the end with sums on the host, and warns; a function that
    runs the model is called once more, with sums on the host.

    Sequences of equal length from consecutive batches run together, which changes sums only by
    rounding: some 8,192 tokens on a device with its own memory, 2,048 on a CPU and with gradients.
    Each batch runs by itself if `normalize` is "peft", or, on a device with its own memory, if
    `batches` can be read only once. Messages count the batches as given.


    Args:
        model: a transformers model, or any other module.
        batches: token ids (batch, seq), or mappings of the arguments of the model's forward, such
            as `input_ids`, `attention_mask`, `pixel_values` or `labels`. Padding never counts:
            masks tell where it is, and in the decoder of an encoder–decoder also labels of -100.
            The `token_mask` of a text, (batch, seq) of ones and zeros such as `labels != -100`,
            marks the tokens that count; the model reads the others too.

            Instead of batches a function without arguments may be given, which runs the model on
            the same data each time it is called.
        targets: layers to calibrate; see `corda_kernels.targets.target_layers`.
        experts: "shared" adds fused experts to "all-linear". All experts of a layer then have one
            covariance of the hidden states they read, under the name of the parameter
            ("model.layers.0.mlp.experts.gate_up_proj"), and each expert has one of the inputs of
            its down projection, under that name and its number ("….experts.down_proj.5").
            With "each" every expert also has a covariance of the hidden states that are routed to
            it. An expert's own covariances are drawn towards the mean of its layer; an expert
            without tokens gets that mean, with a warning. None leaves experts out of "all-linear",
            and means "shared" for those that `targets` names.
        outlier_threshold: |x| above which an activation is counted as an outlier, in units of x.
        normalize: "tokens" for the mean over tokens; "peft" divides each call's input by |max x|
            and takes the mean over calls, as PEFT's own CorDA does.
        on_unseen: "error" to stop at targets that were never called, "skip" to leave them out (and
            not to warn of experts without tokens).
        checkpoint: file for the sums so far, and whether to continue from it. An interrupted run
            gives the same result to the last bit. Each of several ranks has a file of its own, and
            a run must continue with the same number of ranks.
        distributed: whether the ranks of torch.distributed share the batches. All ranks must be
            given the same model, batches and options, which they compare before the first forward
            pass (batches that can be read only once, at their end); all get the same result.
        progress: whether to show a progress bar with tokens per second.
        sides: "both" also takes gradients, by a backward pass through the activations after each
            forward pass, which then includes the output head. `gradients` of the result has for
            every layer D = (1/n) Σ g gᵀ (out, out), Ḡ = (1/n) Σ g xᵀ (out, in) and the number
            (1/n) Σ ‖g‖² ‖x‖². Here g (out,) is the gradient of the summed token losses at the
            layer's output for one token, and the sums go over the same n tokens as in C: padding
            does not count, a token with a masked label does, because later losses depend on it. So
            Ḡ is the weight gradient of the summed losses, divided by n. Fused experts need
            `experts="each"`: an expert's means are over the tokens that are routed to it, drawn
            towards its layer's mean by the weight of one token.
        labels: tokens that the losses are of. "given": a batch's `labels`, (batch, seq) int64 as in
            transformers (position i predicts the label at i + 1; -100 for no loss), or without them
            the text itself. "sampled": tokens drawn from the model's own distribution, seeded by
            the batch's number, where a label counts, or everywhere without labels. Then D and C are
            the Kronecker factors of the Fisher matrix, and ½ tr(D ΔW C ΔWᵀ), scaled as in
            `DriftPenalty`, estimates the mean KL divergence from the base.




    Returns:
        Covariances by module name, C = (1/n) Σ x xᵀ with x (in,) one token's input.

    Raises:
        ModelError: `model` is no module, or sides is "both" and it has no output head.
        TargetError: no layer matches.
        CalibrationError: there were no tokens, a batch is malformed or holds an argument that the
            model does not take, or a target was never called.
        NonFiniteActivationError: a layer received NaN or Inf.
        CheckpointError: the checkpoint to continue from is damaged, or of another run.
        DistributedError: another rank has ended, or was given something else.
        ConfigError: an option has a value that is not allowed; or `distributed` without a process
            group.

    Source: the covariance C = XXᵀ of CorDA (arXiv:2406.05223, section 3.2), scaled by 1/n; D of
    sampled labels as in K-FAC (arXiv:1503.05671, section 3).
    """
    run = CalibrationRun(
        model,
        targets,
        experts,
        outlier_threshold,
        normalize,
        on_unseen,
        checkpoint,
        distributed,
        progress,
        sides,
        labels,
    )
    if callable(batches) and not isinstance(batches, Iterable):
        return _watched(run, batches)
    run.agree("calibrate", batches)
    capture, text = run.retry(batches, lambda: _accumulate(run, batches), "starting again")
    run.ranks.agree("the end of the text", text.given)
    run.ranks.add_up(capture, run.device)
    return run.result(capture, sum(text.counts))


def _watched(run: CalibrationRun, run_model: Callable[[], object]) -> CovarianceSet:
    """The covariances of what `run_model` lets the model read."""
    if run.sides == "both":
        raise ConfigError(
            'sides="both" needs batches to compute losses, not a function that runs the model: '
            'give batches, or take sides="inputs"'
        )
    if run.distributed or run.checkpoint is not None:
        raise ConfigError(
            "a function that runs the model can be neither shared out over ranks nor resumed: give "
            "batches, or leave distributed and checkpoint out"
        )
    watch = Watch(run.model, run_model, "calibrate fewer targets at a time")
    capture = watch.sums(lambda: run.capture(run.readers, RowMasks(run.model)))
    return run.result(capture, capture.tokens())


def _accumulate(run: CalibrationRun, batches: Iterable[Batch]) -> tuple[InputCapture, TextSum]:
    """The sums of this rank's batches, those from a checkpoint included; and the whole text."""
    capture = run.capture(run.readers, RowMasks(run.model))
    journal, text = run.journal(), TextSum()
    # Batches whose sums come from a checkpoint, those of other ranks included.
    restored, restored_text = journal.restore([capture]) if journal.holds() else (0, "")
    kept_tokens, interval = 0, 0.0

    def unread(numbered: Iterable[tuple[int, Batch, bool]]) -> Iterator[tuple[int, Batch, bool]]:
        nonlocal kept_tokens
        for index, batch, own in numbered:
            if index + 1 == restored and text.own() != restored_text:
                raise foreign(journal.file(), "data")
            if index < restored:
                kept_tokens = text.span[1]
            else:
                yield index, batch, own
        if len(text.counts) < restored:
            raise foreign(journal.file(), "data")

    recent: deque[list[Piece]] = deque(maxlen=2)  # windows whose sums may not be looked at yet
    reads = contextlib.closing(run.read(batches, text))
    try:
        with evaluating(run.model), capture, reads as numbered:
            for window in run.windows(unread(numbered), text, run.tokens_together(batches)):
                recent.append(window)
                _add(run, capture, window)
                interval = interval or journal.interval([capture])
                if text.span[1] - kept_tokens >= interval:
                    journal.keep([capture], len(text.counts), text.own())
                    kept_tokens = text.span[1]
            capture.check()
    except (BatchError, NonFiniteActivationError) as error:
        window = next((w for w in recent if error.batch in {piece.batch for piece in w}), [])
        capture.restore([])  # which gives memory back
        named = _by_itself(run, window) or error
        raise named from named.__cause__
    return capture, text


def _add(run: CalibrationRun, capture: InputCapture, window: Sequence[Piece]) -> None:
    """Adds what the layers read of batches that run together."""
    for inputs, batches in run.together(window):
        capture.begin_rows(inputs.pop("token_mask", None))
        run.forward(inputs, batches)
    first, last = window[0], window[-1]
    capture.end_pass(first.batch, (first.span[0], last.span[1]))


def _by_itself(run: CalibrationRun, window: Sequence[Piece]) -> Exception | None:
    """Runs batches that failed together one by one: the error of the one that fails alone."""
    for _, pieces in itertools.groupby(window, lambda piece: piece.batch):
        capture = run.capture(run.readers, RowMasks(run.model))
        try:
            with evaluating(run.model), capture:
                _add(run, capture, list(pieces))
            capture.check()
        except (BatchError, NonFiniteActivationError) as error:
            return error
    return None
