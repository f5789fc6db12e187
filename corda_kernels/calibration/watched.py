"""Forward passes that a function makes, watched: the sums of what layers read in them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import ODD_VALUES, looks_padded, ones_and_zeros
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.forward import evaluating
from corda_kernels.errors import CalibrationError, OutOfMemoryWarning, PaddingWarning, warn
from corda_kernels.memory import has_own_memory
from corda_kernels.structure import input_device


@dataclass
class Watch:
    """Watches the forward passes of `run_model`.

    A pass is a call of the model, or of a part of it that takes token ids (the decoder without its
    head), that lies in no other such call.

    Attributes:
        model: what `run_model` runs; the attention mask that it is called with tells which rows
            count.
        run_model: runs the model on the calibration data, any number of times and batch sizes; on
            the same data each time that it is called.
        remedy: what else takes less memory, for messages.
        on_host: whether inputs are copied to the host, and summed up there; from the first time on
            that a device's memory has run out.
    """

    model: nn.Module
    run_model: Callable[[], object]
    remedy: str
    on_host: bool = field(default=False, init=False)
    _passes: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)  # of the passes that have ended
    _depth: int = field(default=0, init=False)

    def sums(self, make: Callable[[], InputCapture]) -> InputCapture:
        """Calls `run_model` and gives the sums of what it lets the layers read.

        The model is in eval mode meanwhile; its modes, and hooks of others, are as before
        afterwards, whatever happens. Where a device's memory runs out there is a warning, and
        another call with sums on the host.

        Args:
            make: makes empty sums.

        Raises:
            NonFiniteActivationError: a layer received NaN or Inf; `batch` counts the passes.
            CalibrationError: a layer's input cannot be matched with the attention mask, or that
                holds something else than ones and zeros; or a second call of `run_model` ran less
                than the first.
        """
        seen = 0
        while True:
            capture = make()
            try:
                self._run(capture)
                break
            except torch.OutOfMemoryError:
                if self.on_host or not has_own_memory(input_device(self.model)):
                    raise
            # Outside of the handler, for the error holds on to the first sums.
            self.on_host, seen = True, self._passes
            warn(
                "memory ran out in run_model: it is called again with sums on the CPU, which takes "
                f"longer; if it reads an iterator, what {seen} call(s) of the model took of that "
                f"is used up; it also helps to {self.remedy}",
                OutOfMemoryWarning,
            )
        if self._passes < seen:
            raise CalibrationError(
                f"memory ran out in call {seen} of the model by run_model, which then called it "
                f"{self._passes} time(s) only: let it run the same data each time (a list, not an "
                f"iterator that is used up), or {self.remedy}"
            )
        return capture

    def _run(self, capture: InputCapture) -> None:
        """Calls `run_model` under watch."""
        self._passes = self._tokens = self._depth = 0
        capture.on_host = self.on_host
        with evaluating(self.model), capture, contextlib.ExitStack() as hooks:
            for module in self.model.modules():
                names = inspect.signature(module.forward).parameters.keys()
                if module is self.model or names >= {"input_ids", "attention_mask"}:
                    begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
                    end = partial(self._end, capture)
                    hooks.enter_context(begin)
                    hooks.enter_context(module.register_forward_hook(end, always_call=True))
            self.run_model()
        self._end_pass(capture)  # of what ran other parts of the model alone

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        names = inspect.signature(module.forward).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if not ones_and_zeros(mask):
                raise CalibrationError(
                    f"call {self._passes} of the model (counted from 0) gives attention_mask "
                    f"{ODD_VALUES}"
                )
            return
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if pad is not None and isinstance(ids, Tensor) and looks_padded(ids, pad):
            lacks = "no attention mask" if mask is None else "no attention mask of (batch, tokens)"
            warn(
                f"call {self._passes} of the model (counted from 0) is padded (token {pad}) but "
                f"was given {lacks}: the padding counts as text and inflates the covariances; pass "
                "attention_mask to the model in run_model",
                PaddingWarning,
            )

    def _end(self, capture: InputCapture, module: nn.Module, args: object, output: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if output is not None:  # nothing comes out of a pass that raised
            self._end_pass(capture)
        self._passes += 1

    def _end_pass(self, capture: InputCapture) -> None:
        before, self._tokens = self._tokens, capture.tokens()
        capture.end_pass(self._passes, (before, self._tokens))
