"""Model and tokens in, covariances out."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import token_count, unpadded
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance import CovarianceSet
from corda_kernels.errors import CalibrationError, LeftOutWarning
from corda_kernels.models import decoder, output_head, target_linears, unreached_weights
from corda_kernels.progress import progress_bar
from corda_kernels.versions import library_versions

if TYPE_CHECKING:
    from tqdm import tqdm

Batch = Tensor | Mapping[str, Any]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "all-linear",
    outlier_threshold: float = 6.0,
    normalize: Literal["tokens", "peft"] = "tokens",
    on_unseen: Literal["error", "skip"] = "error",
    progress: bool = True,
) -> CovarianceSet:
    """Runs the model over calibration text: the covariance of every target layer's inputs.

    The model runs in eval mode without its output head; its hooks, modes and weights are as before
    afterwards, whatever happens. Layers that read the same tensor share one covariance. Sums are
    kept in float32 or better.

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
        progress: whether to show a progress bar with tokens per second.

    Returns:
        Covariances by module name, C = (1/n) Σ x xᵀ with x (in,) one token's input.

    Raises:
        TargetError: no layer matches.
        CalibrationError: there were no tokens, a batch is malformed, or a target was never called.
        NonFiniteActivationError: a layer received NaN or Inf.

    Source: the covariance C = XXᵀ of CorDA (arXiv:2406.05223, section 3.2), scaled by 1/n.
    """
    linears = target_linears(model, targets)
    _check_plain(model)
    left_out = unreached_weights(model) if targets == "all-linear" else {}
    _warn_left_out(left_out)
    head = output_head(model)
    runner = (
        model
        if head is not None and any(module is head for module in linears.values())
        else decoder(model)
    )
    options = _options(runner)
    device = next(model.parameters()).device
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    capture = InputCapture(linears, outlier_threshold, normalize)
    tokens = 0
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        evaluating(model),
        capture,
        _token_bar(batches, progress) as bar,
    ):
        for index, batch in enumerate(batches):
            before = tokens
            for inputs in unpadded(batch, index, pad_token_id=pad):
                runner(**{name: value.to(device) for name, value in inputs.items()}, **options)
                count = inputs["input_ids"].numel()
                tokens += count
                bar.update(count)
            capture.end_pass(index, (before, tokens))
    if not tokens:
        raise CalibrationError(
            "there were no tokens to calibrate on: the batches are empty or masked throughout"
        )
    unseen = capture.unseen()
    if unseen and on_unseen == "error":
        raise CalibrationError(
            f"{len(unseen)} target layer(s) never received a token: {', '.join(unseen[:5])}"
            f"{', …' if len(unseen) > 5 else ''}; leave them out of the targets, or use more text "
            'if they are routed experts, or pass on_unseen="skip"'
        )
    return CovarianceSet(
        capture.covariances(),
        normalize=normalize,
        left_out=left_out | dict.fromkeys(unseen, "never called during calibration"),
        provenance={
            "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
            "tokens": tokens,
            "versions": library_versions(),
        },
    )


def _check_plain(model: nn.Module) -> None:
    if getattr(model, "peft_config", None):
        raise CalibrationError(
            "the model carries a PEFT adapter already; calibrate the base model before attaching "
            "one (model.unload() takes it off)"
        )


def _warn_left_out(left_out: Mapping[str, str]) -> None:
    if left_out:
        name, reason = next(iter(left_out.items()))
        warnings.warn(
            f"{len(left_out)} weight(s) get no covariance and no adapter, among them {name}: "
            f"{reason}; all are named in left_out",
            LeftOutWarning,
            stacklevel=4,
        )


def _options(runner: nn.Module) -> dict[str, Any]:
    """Keyword arguments that spare the pass what calibration does not use."""
    accepted = inspect.signature(runner.forward).parameters
    return {"use_cache": False} if "use_cache" in accepted else {}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _token_bar(batches: Iterable[Batch], shown: bool) -> tqdm[Any]:
    total = None
    if isinstance(batches, Sequence) and isinstance(batches, Sized):
        total = sum(token_count(batch) for batch in batches)
    return progress_bar(
        description="calibrating", unit="tokens", shown=shown, total=total, scaled=True
    )
