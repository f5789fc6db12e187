"""The user's forward passes, watched: covariances of the targets' inputs, without padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import ODD_VALUES, looks_padded, ones_and_zeros
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.forward import evaluating
from corda_kernels.calibration.masks import RowMasks
from corda_kernels.errors import CalibrationError, OutOfMemoryWarning, PaddingWarning, warn
from corda_kernels.memory import has_own_memory
from corda_kernels.structure import input_device


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen of one layer's inputs.

    Attributes:
        matrix: C (in, in) float32, or float64 for such inputs; the mean over tokens, or over calls
            for normalize "peft".
        calls: forward calls of the layer.
    """

    matrix: Tensor
    calls: int


@dataclass
class Observer:
    """Watches the forward passes of `run_model`.

    It tells the capture where a pass begins and ends. A pass is
    a call of the model, or of a part of it that takes token ids (the decoder without its head),
    that lies in no other such call.

    Attributes:
        model: what `run_model` runs; the attention mask that it is called with tells which rows
            count.
        run_model: runs the model on the calibration data, any number of times and batch sizes; on
            the same data each time that it is called.
        normalize: see `calibrate`.
        on_host: whether inputs are copied to the host, and summed up there; from the first time on
            that a device's memory has run out.
    """

    model: nn.Module
    run_model: Callable[[], object]
    normalize: str
    on_host: bool = False
    _capture: InputCapture = field(init=False)
    _passes: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)  # of the passes that have ended
    _size: int = field(default=0, init=False)  # tokens of the present pass
    _depth: int = field(default=0, init=False)

    @torch.no_grad()
    def observe(self, names: Iterable[str]) -> dict[str, Observed]:
        """Calls `run_model` and gives the covariances of what each layer that it calls read.

        The model is in eval mode meanwhile; its modes, and hooks of others, are as before
        afterwards, whatever happens. Where a device's memory runs out there is a warning, and
        another call with sums on the host.

        Args:
            names: of the layers; those that this model does not have are passed by.

        Raises:
            NonFiniteActivationError: a layer received NaN or Inf; `batch` counts the model's calls.
            CalibrationError: a layer's input cannot be matched with the attention mask, or that
                holds something else than ones and zeros; or a second call of `run_model` ran less
                than the first.
        """
        every = dict(self.model.named_modules())
        modules = {name: every[name] for name in names if name in every}
        seen = 0
        while True:
            try:
                self._run(modules)
                break
            except torch.OutOfMemoryError:
                if self.on_host or not has_own_memory(input_device(self.model)):
                    raise
            # Outside of the handler, for the error holds on to the first sums.
            self.on_host, seen = True, self._tokens
            warn(
                "memory ran out in run_model: it is called again with sums on the CPU, which takes "
                f"longer; if it reads an iterator, {seen} tokens of that are used up; memory_limit "
                "bounds the memory of covariances",
                OutOfMemoryWarning,
            )
        if self._tokens < seen:
            raise CalibrationError(
                f"memory ran out while run_model ran, and its second call ran {self._tokens} "
                f"tokens where the first had run {seen}: let it run the same data each time (a "
                "list, not an iterator that is used up), or pass memory_limit"
            )
        found = self._capture.covariances()
        del self._capture  # whoever decomposes them frees them one by one
        return {name: Observed(each.matrix, each.calls) for name, each in found.items()}

    def _run(self, modules: dict[str, nn.Module]) -> None:
        """Calls `run_model` under watch, with new sums."""
        self._passes = self._tokens = self._depth = 0
        self._capture = InputCapture(
            modules,
            normalize=self.normalize,
            statistics=False,
            on_host=self.on_host,
            masks=RowMasks(self.model),
        )
        with evaluating(self.model), self._capture, contextlib.ExitStack() as hooks:
            for module in self.model.modules():
                names = inspect.signature(module.forward).parameters.keys()
                if module is self.model or names >= {"input_ids", "attention_mask"}:
                    begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
                    hooks.enter_context(begin)
                    hooks.enter_context(module.register_forward_hook(self._end, always_call=True))
            self.run_model()
        self._capture.end_pass(self._passes, (self._tokens, self._tokens))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        names = inspect.signature(module.forward).parameters
        arguments = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        # Token ids, embeddings, or whatever tensor comes first.
        inputs = [ids, arguments.get("inputs_embeds"), *arguments.values()]
        first = next((value for value in inputs if isinstance(value, Tensor)), torch.empty(0, 1))
        shape = first.shape[:-1] if first.is_floating_point() else first.shape
        self._size = shape.numel()
        if isinstance(mask, Tensor) and mask.ndim == len(shape) == 2:
            if not ones_and_zeros(mask):
                raise CalibrationError(
                    f"call {self._passes} of the model (counted from 0) gives attention_mask "
                    f"{ODD_VALUES}"
                )
            # With a cache the mask covers earlier tokens too, which are not run again.
            self._size = int(mask[:, -shape[1] :].sum())
            return
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if pad is not None and isinstance(ids, Tensor) and looks_padded(ids, pad):
            given = "no attention mask" if mask is None else "no attention mask of (batch, tokens)"
            warn(
                f"call {self._passes} of the model (counted from 0) is padded (token {pad}) but "
                f"was given {given}: the padding counts as text and inflates the covariances; pass "
                "attention_mask to the model in run_model",
                PaddingWarning,
            )

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if output is not None:  # nothing comes out of a pass that raised
            self._capture.end_pass(self._passes, (self._tokens, self._tokens + self._size))
        self._passes += 1
        self._tokens += self._size
