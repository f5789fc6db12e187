"""The user's forward passes, watched: covariances of the targets' inputs, without padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import ODD_MASK, looks_padded, ones_and_zeros
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.passes import evaluating
from corda_kernels.errors import CalibrationError, OutOfMemoryWarning, PaddingWarning, warn
from corda_kernels.memory import has_own_memory
from corda_kernels.models import input_device


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


@dataclass
class Observer:
    """Watches the forward passes of `run_model`.

    Attributes:
        normalize: see `calibrate`.
        on_host: whether inputs are copied to the host, and summed up there; from the first time on
            that a device's memory has run out.
    """

    normalize: Literal["tokens", "peft"]
    on_host: bool = False

    @torch.no_grad()
    def observe(
        self, model: nn.Module, modules: Mapping[str, nn.Module], run_model: Callable[[], object]
    ) -> dict[str, Observed]:
        """Calls `run_model` and gives the covariances of what each of `modules` that it calls read.

        The model is in eval mode meanwhile; its modes, and hooks of others, are as before
        afterwards, whatever happens. Where a device's memory runs out there is a warning, and
        another call with sums on the host.

        Args:
            model: what `run_model` runs; the attention mask that it is called with tells which rows
                count.
            modules: layers within it, by name.
            run_model: runs the model on the calibration data, any number of times and batch sizes;
                on the same data each time that it is called.

        Raises:
            NonFiniteActivationError: a layer received NaN or Inf; `batch` counts the model's calls.
            CalibrationError: a layer's input cannot be matched with the attention mask, or that
                holds something else than ones and zeros; or a second call of `run_model` ran less
                than the first.
        """
        seen = 0
        passes = self._passes(model, modules)
        try:
            passes.run(run_model)
        except torch.OutOfMemoryError:
            if self.on_host or not has_own_memory(input_device(model)):
                raise
            self.on_host, seen = True, passes.tokens
        if self.on_host and not passes.finished:
            # Outside of the handler, for the error holds on to the first sums.
            warn(
                "memory ran out while run_model ran: it is called again, with covariances that the "
                f"CPU sums up, which takes longer; if it reads an iterator, {seen} tokens of that "
                "are used up; memory_limit bounds covariances",
                OutOfMemoryWarning,
            )
            passes = self._passes(model, modules)
            passes.run(run_model)
            if passes.tokens < seen:
                raise CalibrationError(
                    f"memory ran out while run_model ran, and its second call ran {passes.tokens} "
                    f"tokens where the first had run {seen}: let it run the same data each time "
                    "(a list, not an iterator that is used up), or pass memory_limit"
                )
        return {
            name: Observed(found.matrix, found.tokens, found.calls)
            for name, found in passes.capture.covariances().items()
        }

    def _passes(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> _Passes:
        capture = InputCapture(
            modules, normalize=self.normalize, statistics=False, on_host=self.on_host
        )
        return _Passes(model, capture)


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
    finished: bool = False
    _depth: int = field(default=0, init=False)
    _size: int = field(default=0, init=False)  # tokens of the present pass

    def run(self, run_model: Callable[[], object]) -> None:
        """Calls `run_model` under watch."""
        with evaluating(self.model), self.capture, contextlib.ExitStack() as hooks:
            for module in self.model.modules():
                if module is self.model or _takes_tokens(module):
                    begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
                    end = module.register_forward_hook(self._end, always_call=True)
                    hooks.callback(begin.remove)
                    hooks.callback(end.remove)
            run_model()
        self.capture.end_pass(self.count, (self.tokens, self.tokens))
        self.finished = True

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        arguments = _arguments(module, args, kwargs)
        shape = _token_shape(arguments)
        mask = arguments.get("attention_mask")
        rows = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and shape is not None and len(shape) == 2:
            if not ones_and_zeros(mask):
                raise CalibrationError(
                    f"call {self.count} of the model (counted from 0) was given {ODD_MASK}"
                )
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
            warn(
                f"call {self.count} of the model (counted from 0) is padded (token {pad}) but was "
                f"given {given}: the padding counts as text and inflates the covariances; pass "
                "attention_mask to the model in run_model",
                PaddingWarning,
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
