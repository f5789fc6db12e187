"""How a model calls its decoder blocks, recorded without running them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.errors import CalibrationError

HOST = torch.device("cpu")


@dataclass
class Sequences:
    """Sequences of equal length that run together, on their way through the blocks.

    Attributes:
        batch: number of the batch that they come from.
        span: range of that batch's tokens in the text.
        hidden: what the next block reads, on the host.
        calls: what each block is called with besides the hidden states.
    """

    batch: int
    span: tuple[int, int]
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """Arguments of a block, less the hidden states, which come first or by this name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """What the block returns."""
        if self.name is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.name: hidden}, **self.kwargs)


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block returned: a tensor, or a tuple that has nothing else."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        first, *others = output
        if isinstance(first, Tensor) and not any(isinstance(other, Tensor) for other in others):
            return first
    raise unsuitable("its blocks return more than hidden states")


def unsuitable(reason: str) -> CalibrationError:
    """The error for a model that does more than run its blocks in order."""
    return CalibrationError(
        f"the model cannot be calibrated block by block, for {reason}: calibrate it in one pass"
    )


@dataclass
class Recorder:
    """Stands in for every block: passes the hidden states on, and notes the other arguments."""

    blocks: list[nn.Module]
    current: Sequences | None = None
    _passed: Tensor | None = None
    _tuple: bool | None = None  # whether blocks return one
    _seen: dict[tuple[Any, ...], deque[Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def in_place_of_blocks(self) -> Iterator[None]:
        """Replaces the forward methods, below the hooks of accelerate, which would load weights."""
        own = [vars(block).get("forward") for block in self.blocks]
        originals = [block.forward for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                vars(block)["forward"] = self._stand_in(index, originals[index])
            yield
        finally:
            for block, before in zip(self.blocks, own, strict=True):
                if before is None:
                    del vars(block)["forward"]
                else:
                    vars(block)["forward"] = before

    def _stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self.current is not None
            name = None if args else "hidden_states"
            if name is not None and name not in kwargs:
                raise unsuitable(f"its blocks are called without {name}")
            hidden = args[0] if name is None else kwargs.pop(name)
            if len(self.current.calls) != index:
                raise unsuitable("its blocks do not run once each in their order")
            if index == 0:
                self.current.hidden = hidden.to(HOST)
            elif hidden is not self._passed:
                raise unsuitable("something happens to the hidden states between its blocks")
            call = Call(self._kept(args[1:]), self._kept(kwargs), name)
            self.current.calls.append(call)
            self._passed = hidden
            if self._tuple is None:
                output = call.run(original, hidden.clone())
                hidden_states(output)
                self._tuple = isinstance(output, tuple)
            return (hidden,) if self._tuple else hidden

        return forward

    def _kept(self, value: Any) -> Any:
        """The same arguments, with one tensor for all that are equal.

        Masks and rotary embeddings are the same for all blocks and for all texts of one length.
        """
        if isinstance(value, Tensor):
            known = self._seen.setdefault((value.shape, value.dtype, value.device), deque(maxlen=8))
            for tensor in known:
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            known.append(value)
            return value
        if isinstance(value, tuple | list):
            return type(value)(self._kept(entry) for entry in value)
        if isinstance(value, dict):
            return {name: self._kept(entry) for name, entry in value.items()}
        return value
