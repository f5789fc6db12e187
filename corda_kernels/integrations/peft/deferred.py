"""Logits that are computed when somebody looks at them.

Scripts written for PEFT run the whole model on the calibration text and throw its logits away, on
which SmolLM2-135M spends a fifth of its forward pass, and 4 bytes for each token and word of the
vocabulary.
"""

from __future__ import annotations

import contextlib
import threading
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
    _lock: threading.RLock

    @staticmethod
    def __new__(cls, like: Tensor, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Any:
        """Of the dtype and on the device of `like`."""
        deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        deferred._compute, deferred._value = compute, None
        deferred._lock = threading.RLock()
        return deferred

    def computed(self) -> Tensor:
        """The numbers, as an ordinary tensor; the same one at every call."""
        with self._lock:
            if self._value is None:
                self._value = self._compute()
                del self._compute  # and what it holds
            return self._value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Once the numbers are there they may have got another shape in place.
        described = func in _DESCRIPTION and args[0]._value is None
        if described or func is Tensor.__hash__:
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


class _DeferringLinear(nn.Linear):
    """What a head is for a while. Copies and replicas that are made meanwhile compute as ever."""

    # What each head that defers has given; by its id, so that it stays behind when one is copied.
    given: dict[int, list[weakref.ref[DeferredTensor]]] = {}  # noqa: RUF012

    def forward(self, input: Tensor) -> Tensor:
        given = self.given.get(id(self))
        if given is None or not _deferrable(self, input):
            return super().forward(input)
        parts = [input, self.weight] if self.bias is None else [input, self.weight, self.bias]
        states = [_state(part) for part in parts]

        def compute() -> Tensor:
            if [_state(part) for part in parts] != states:
                raise CalibrationError(
                    "the output head's input or weight was changed in place before the logits "
                    "were read: read the logits first, or change a copy"
                )
            with torch.inference_mode(False), torch.no_grad(), without_autocast():
                logits: Tensor = nn.functional.linear(*parts)
            return logits

        deferred: DeferredTensor = DeferredTensor(
            input, (*input.shape[:-1], len(parts[1])), compute
        )
        given.append(weakref.ref(deferred))
        return deferred


@contextlib.contextmanager
def deferred_output(head: nn.Module | None) -> Iterator[None]:
    """Inside the block, `head` gives deferred tensors, which are as good as its output.

    Those that are still held at the end of the block are computed there, before anybody changes the
    model. Where a deferred tensor would not do the head computes as ever: with gradients, under
    autocast or inference mode, while compiling, where it is not a plain linear layer, has forward
    hooks or a forward that another library has wrapped, or where its input is elsewhere.

    To look at a deferred tensor raises a CalibrationError where the head's input or weight has been
    changed in place since.

    Args:
        head: the output head; None for nothing.
    """
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield
        return
    given: list[weakref.ref[DeferredTensor]] = []
    _DeferringLinear.given[id(head)] = given
    head.__class__ = _DeferringLinear
    try:
        yield
    finally:
        head.__class__ = nn.Linear
        del _DeferringLinear.given[id(head)]
    for reference in given:
        held = reference()
        if held is not None:
            # What can no longer be computed is an error to who looks, and to nobody else.
            with contextlib.suppress(CalibrationError):
                held.computed()


def _deferrable(head: nn.Linear, hidden: Any) -> bool:
    return (
        not torch.compiler.is_compiling()  # first, for it follows none of the others
        and type(hidden) is Tensor
        and hidden.ndim > 0
        and hidden.shape[-1] == head.weight.shape[-1]
        and hidden.dtype == head.weight.dtype
        and hidden.device == head.weight.device
        # Hooks may take the weights away as soon as they have run.
        and not head._forward_hooks
        and not hidden.is_inference()
        and not head.weight.is_inference()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def _state(tensor: Tensor) -> tuple[int, int]:
    """What is another one once a tensor has been changed, or given other memory."""
    return tensor._version, tensor.data_ptr()
