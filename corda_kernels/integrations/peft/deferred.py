"""Logits that are computed when somebody looks at them.

Scripts written for PEFT run the whole model on the calibration text and throw its logits away, of
which SmolLM2-135M's head makes a fifth of the forward pass, and 4 bytes for each token and word of
the vocabulary.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from corda_kernels.errors import CalibrationError
from corda_kernels.precision import without_autocast

# What a tensor tells of itself without its numbers.
_DESCRIPTION = {
    Tensor.__hash__,
    Tensor.dim,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
    ),
}


class DeferredTensor(Tensor):
    """A tensor of known shape whose numbers are computed once, by the first call that wants them.

    To its reader it is an ordinary tensor: whatever is done with it is done with the numbers, and
    gives ordinary tensors.
    """

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Any:
        """Of the dtype and on the device of `like`."""
        deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        deferred._compute, deferred._value = compute, None
        return deferred

    def computed(self) -> Tensor:
        """The numbers, as an ordinary tensor; the same one at every call."""
        if self._value is None:
            self._value = self._compute()
            del self._compute  # and what it holds
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _DESCRIPTION:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls._with_numbers(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch documents it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return cls._with_numbers(func, args, kwargs)

    @classmethod
    def _with_numbers(cls, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        args, kwargs = tree_map_only(cls, cls.computed, (args, kwargs or {}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def deferred_output(head: nn.Module | None) -> Iterator[None]:
    """Inside the block, `head` gives deferred tensors, which are as good as its output.

    Those that are still held at the end of the block are computed there, before anybody changes the
    model. Where a deferred tensor would not do (gradients, autocast, a head that is not a plain
    linear layer, whose forward another library has wrapped, or whose input is elsewhere) the head
    computes as ever.

    Args:
        head: the output head; None for nothing.

    Raises:
        CalibrationError: the head's input was changed in place before its output was read; from the
            reading call.
    """
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield
        return
    forward: Callable[..., Tensor] = head.forward
    given: list[weakref.ref[DeferredTensor]] = []

    def deferring(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 1 or not _deferrable(head, args[0]):
            return forward(*args, **kwargs)
        hidden: Tensor = args[0]
        version = hidden._version

        def compute() -> Tensor:
            if hidden._version != version:
                raise CalibrationError(
                    "the output head's input was changed in place before the logits were read: "
                    "read the logits first, or change a copy"
                )
            with torch.inference_mode(False), torch.no_grad(), without_autocast():
                logits: Tensor = forward(hidden)
            return logits

        deferred: DeferredTensor = DeferredTensor(
            hidden, (*hidden.shape[:-1], head.out_features), compute
        )
        given[:] = [reference for reference in given if reference() is not None]
        given.append(weakref.ref(deferred))
        return deferred

    head.forward = deferring  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
    for reference in given:
        held = reference()
        if held is not None:
            held.computed()


def _deferrable(head: nn.Linear, hidden: Any) -> bool:
    return (
        type(hidden) is Tensor
        and hidden.ndim > 0
        and hidden.shape[-1] == head.in_features
        and hidden.dtype == head.weight.dtype
        and hidden.device == head.weight.device
        and not hidden.is_inference()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden.device.type)
        and not torch.compiler.is_compiling()
    )
