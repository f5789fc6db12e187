"""Which rows of a layer's input are padding: what the calls around it say of their sequences."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.batches import ones_and_zeros
from corda_kernels.errors import CalibrationError

# What transformers ignores in a loss, and fills decoder ids with padding for.
_IGNORED = -100


@dataclass(frozen=True, eq=False)
class _Sequence:
    """The sequence that a call is about; masks (batch, seq) are bool, None where all counts.

    Attributes:
        mask: its positions that count.
        decoder: those of the decoder's sequence, of an encoder–decoder.
        context: an encoder's states that the call reads too, with their mask.
        parts: whether it holds further models, whose sequences are others.
    """

    mask: Tensor | None = None
    decoder: Tensor | None = None
    context: tuple[Tensor | None, Tensor | None] = (None, None)
    parts: bool = False


@dataclass
class RowMasks:
    """Tells, while it is entered, which rows of a layer's input count in the running call.

    A position counts if the attention mask of the innermost model around the layer says so, as
    transformers hands it on: that of the encoder, of the decoder, of the language model. Models
    without one, such as vision towers, count whole. A decoder without a mask goes by the labels
    (all but -100), or by the mask of the token ids where it is made to read those.

    Attributes:
        model: what is called.
    """

    model: nn.Module
    _calls: list[_Sequence] = field(default_factory=list, init=False)
    _counted: tuple[Tensor, Tensor] | None = field(default=None, init=False)  # see `_numbers`
    _hooks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def __enter__(self) -> RowMasks:
        from transformers import PreTrainedModel

        for module in self.model.modules():
            names = tuple(inspect.signature(module.forward).parameters)
            whole = module is self.model or isinstance(module, PreTrainedModel)
            if whole or "attention_mask" in names:
                inner = (each for each in module.modules() if whole and each is not module)
                parts = any(isinstance(each, PreTrainedModel) for each in inner)
                begin = partial(self._begin, names, whole, parts)
                self._hooks.enter_context(module.register_forward_pre_hook(begin, with_kwargs=True))
                end = module.register_forward_hook(self._end, always_call=True)
                self._hooks.enter_context(end)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._calls.clear()

    def _begin(
        self,
        names: tuple[str, ...],
        whole: bool,
        parts: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        outer = self._calls[-1] if self._calls else _Sequence()
        own, states = given.get("attention_mask"), given.get("encoder_hidden_states")
        told = isinstance(own, Tensor) and own.ndim == 2 and ones_and_zeros(own)
        if not whole and not told:
            self._calls.append(outer)  # a layer, of the sequence of its model
            return
        mask: Tensor | None = None
        if told:
            mask = _padded(own, given)
        elif states is not None:
            mask = outer.decoder
        elif own is not None:  # one for attention, made of the outer one
            mask = outer.mask
        decoder = outer.decoder
        if decoder is None and "decoder_input_ids" in names:
            labels = given.get("labels")
            if given.get("decoder_attention_mask") is not None:
                decoder = _padded(given["decoder_attention_mask"])
            elif isinstance(labels, Tensor) and labels.ndim == 2:
                decoder = _padded(labels != _IGNORED)
            elif given.get("decoder_input_ids") is given.get("decoder_inputs_embeds") is None:
                decoder = mask
        context = states, _padded(given.get("encoder_attention_mask"))
        self._calls.append(_Sequence(mask, decoder, context, parts))

    def _end(self, *_: object) -> None:
        if self._calls:  # a call that another hook has stopped never began here
            self._calls.pop()

    @property
    def mask(self) -> Tensor | None:
        """The positions (batch, seq) of the running call's sequence that count; None for all."""
        return self._calls[-1].mask if self._calls else None

    def kept(self, name: str, x: Tensor) -> Tensor | None:
        """The rows of a layer's input that count, (rows,) bool or their numbers; None for all.

        Args:
            name: of the layer.
            x: (..., in), its input in the running call.

        Raises:
            CalibrationError: there is padding, and the rows do not show where.
        """
        call = self._calls[-1] if self._calls else _Sequence()
        states, of_states = call.context
        crossing = x is states
        if states is not None and not crossing and x.shape == states.shape:
            crossing = torch.equal(x, states.to(x))  # accelerate may have copied it to a device
        mask, rows = of_states if crossing else call.mask, x.shape[:-1]
        if mask is None:
            return None
        if rows in (mask.shape, (mask.numel(),)):
            return self._numbers(mask)
        if rows[:2] == mask.shape:
            return mask.view(*mask.shape, *[1] * (len(rows) - 2)).expand(rows).flatten()
        if call.parts or rows == mask.shape[:1]:  # patches of images, or one row a sequence
            return None
        raise CalibrationError(
            f"layer {name} received {rows.numel()} rows, which do not match the attention mask of "
            f"shape {tuple(mask.shape)}: run sequences without padding"
        )

    def _numbers(self, mask: Tensor) -> Tensor:
        """The numbers of the positions of a mask; taken once for all layers, as a device must be
        waited for."""
        if self._counted is None or self._counted[0] is not mask:
            self._counted = mask, mask.flatten().nonzero().flatten()
        return self._counted[1]


def _padded(mask: Any, given: Mapping[str, Any] = MappingProxyType({})) -> Tensor | None:
    """The positions (batch, seq) that a mask keeps, as bool; None where that is all, or no mask.

    With a cache it covers earlier positions too, which a call that is `given` fewer does not run.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not ones_and_zeros(mask):
        return None
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(read := given.get(name), Tensor) and read.ndim > 1:
            mask = mask[:, -read.shape[1] :]
    kept = mask.to(torch.bool)
    return None if bool(kept.all()) else kept
