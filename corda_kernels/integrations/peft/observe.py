"""The user's forward passes, watched: covariances of the targets' inputs, without padding."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import looks_padded
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.subject import evaluating
from corda_kernels.errors import OutOfMemoryWarning, PaddingWarning
from corda_kernels.integrations.peft.deferred import deferred_output
from corda_kernels.memory import has_own_memory
from corda_kernels.models import input_device, output_head


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen of one layer's inputs.

    Attributes:
        matrix: C (in, in) float32, or float64 for such inputs; the mean over tokens, or over calls
            for normalize "peft".
        tokens: how many it was taken from.
        calls: forward calls of the layer.
    """

    matrix: Tensor
    tokens: int
    calls: int


@torch.no_grad()
def observe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    run_model: Callable[[], object],
    *,
    normalize: Literal["tokens", "peft"],
) -> dict[str, Observed]:
    """Calls `run_model` and gives the covariances of what each of `modules` that was called read.

    Where a device's memory runs out it is called once more, with sums on the host.

    The model is in eval mode meanwhile; its modes, and hooks of others, are as before afterwards,
    whatever happens. Logits are computed when `run_model` reads them.

    Args:
        model: what `run_model` runs; the attention mask that it is called with tells which rows
            count.
        modules: layers within it, by name.
        run_model: runs the model on the calibration data, any number of times and batch sizes.
        normalize: see `calibrate`.

    Raises:
        NonFiniteActivationError: a layer received NaN or Inf; `batch` counts the model's calls.
        CalibrationError: a layer's input cannot be matched with the attention mask, or the output
            head's was changed in place before the logits were read.
    """
    try:
        capture = _captured(model, modules, run_model, normalize, on_host=False)
    except torch.OutOfMemoryError:
        if not has_own_memory(input_device(model)):
            raise
        capture = None  # not here: the error holds on to the sums
    if capture is None:
        warnings.warn(
            "memory ran out while run_model ran: running it again with covariances that the CPU "
            "sums up, which takes longer; memory_limit bounds them",
            OutOfMemoryWarning,
            stacklevel=6,  # the caller of preprocess_corda; each no_grad wraps
        )
        capture = _captured(model, modules, run_model, normalize, on_host=True)
    return {
        name: Observed(found.matrix, found.tokens, found.calls)
        for name, found in capture.covariances().items()
    }


def _captured(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    run_model: Callable[[], object],
    normalize: Literal["tokens", "peft"],
    on_host: bool,
) -> InputCapture:
    capture = InputCapture(modules, normalize=normalize, statistics=False, on_host=on_host)
    passes = _Passes(model, capture)
    with evaluating(model), capture, passes.watched(), deferred_output(output_head(model)):
        run_model()
    capture.end_pass(passes.count, (passes.tokens, passes.tokens))
    return capture


@dataclass
class _Passes:
    """Tells the capture where a forward pass begins and ends, and which of its rows are padding.

    A pass is a call of the model, or of a part of it that takes token ids (the decoder without its
    head), that lies in no other such call.
    """

    model: nn.Module
    capture: InputCapture
    count: int = 0
    tokens: int = 0
    _depth: int = field(default=0, init=False)
    _size: int = field(default=0, init=False)  # tokens of the present pass

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        handles = []
        for module in self.model.modules():
            if module is self.model or _takes_tokens(module):
                handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
                handles.append(module.register_forward_hook(self._end, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        arguments = _arguments(module, args, kwargs)
        shape = _token_shape(arguments)
        mask = arguments.get("attention_mask")
        rows = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and shape is not None and len(shape) == 2:
            # With a cache the mask covers earlier tokens too, which are not run again.
            kept = mask[:, -shape[1] :].to(torch.bool)
            rows = None if bool(kept.all()) else kept
            self._size = int(kept.sum())
        else:
            self._size = 0 if shape is None else shape.numel()
            given = "no attention mask" if mask is None else "no attention mask of (batch, tokens)"
            self._warn_of_padding(arguments.get("input_ids"), given)
        self.capture.row_mask = rows

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if output is not None:  # nothing comes out of a pass that raised
            self.capture.end_pass(self.count, (self.tokens, self.tokens + self._size))
        self.capture.row_mask = None
        self.count += 1
        self.tokens += self._size

    def _warn_of_padding(self, ids: object, given: str) -> None:
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if pad is not None and isinstance(ids, Tensor) and looks_padded(ids, pad):
            warnings.warn(
                f"call {self.count} of the model (counted from 0) is padded (token {pad}) but was "
                f"given {given}: the padding counts as text and inflates the covariances; pass "
                "attention_mask to the model in run_model",
                PaddingWarning,
                stacklevel=2,
            )


def _takes_tokens(module: nn.Module) -> bool:
    return {"input_ids", "attention_mask"} <= inspect.signature(module.forward).parameters.keys()


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    names = inspect.signature(module.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


def _token_shape(arguments: Mapping[str, Any]) -> torch.Size | None:
    """(batch, seq) of token ids, of embeddings, or of whatever tensor comes first."""
    found: list[Any] = [arguments.get("input_ids"), arguments.get("inputs_embeds")]
    found += arguments.values()
    first = next((value for value in found if isinstance(value, Tensor)), None)
    if first is None:
        return None
    return first.shape[:-1] if first.is_floating_point() else first.shape
