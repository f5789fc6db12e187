"""Batches as calibration runs them: text without padding, as many at a time as memory holds.

A padded batch of text is taken apart into its sequences without their padding, and sequences of
equal length run together, those of several batches too. That is exact for any padding side, any
position encoding and any attention kernel, needs no mask further down (where routed experts could
not apply it), and computes nothing for the padding. What is more than text runs as it is, see
`masks`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corda_kernels.arguments import holds_numbers
from corda_kernels.errors import BatchError, PaddingWarning, warn
from corda_kernels.files import digest

Batch = Tensor | Mapping[str, Any]

# Of text no inputs of a calibration pass: the loss needs no computing, and padding is taken out.
_DROPPED = ("labels", "attention_mask")
ODD_VALUES = (
    "other values than 1 (a token that counts) and 0: turn an additive mask into one by (mask == 0)"
)


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What a batch gives, by name; a tensor alone is token ids."""
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    return {name: value for name, value in given.items() if value is not None}


def is_text(batch: Batch) -> bool:
    """Whether a batch is token ids and what goes with each of them, so that it can be taken apart.

    Given positions may be of several packed texts. What has no tensor, or none of token ids, counts
    as text, which `unpadded` then reports.
    """
    inputs = inputs_of(batch)
    ids = inputs.get("input_ids")
    if not any(isinstance(value, Tensor) for value in (inputs.values() if ids is None else [ids])):
        return True
    return isinstance(ids, Tensor) and all(
        isinstance(value, Tensor) and value.shape == ids.shape and name != "position_ids"
        for name, value in inputs.items()
        if name not in (*_DROPPED, "token_mask")
    )


def token_count(batch: Batch) -> int:
    """Number of tokens in a batch that count: all of them, or those that its masks keep.

    Without token ids it is the number of samples, such as images. It is 0 for a malformed batch,
    which is refused where it is run.
    """
    inputs = inputs_of(batch)
    ids = inputs.get("input_ids")
    masks = [m for m in map(inputs.get, ("attention_mask", "token_mask")) if isinstance(m, Tensor)]
    if masks:
        usable = all(holds_numbers(mask) and mask.shape == masks[0].shape for mask in masks)
        return int(torch.stack([mask != 0 for mask in masks]).all(0).sum()) if usable else 0
    if isinstance(ids, Tensor):
        return ids.numel()
    return next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim), 0)


class TextSum:
    """Tokens of the batches of a text, and checksums in their order: of all, and of a rank's own.

    Attributes:
        counts: number of tokens in every batch.
        span: range of the last batch's tokens in the text.
    """

    def __init__(self, batches: Iterable[Batch] = ()) -> None:
        self.counts: list[int] = []
        self.span = (0, 0)
        self._whole, self._own = hashlib.sha256(), hashlib.sha256()
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch, *, own: bool = True, summed: bool = True) -> None:
        """Takes in the next batch; into the checksums, if asked for, go its tensors by name."""
        self.counts.append(token_count(batch))
        self.span = (self.span[1], self.span[1] + self.counts[-1])
        if not summed:
            return
        tensors = {name: v for name, v in inputs_of(batch).items() if isinstance(v, Tensor)}
        checksum = digest({name: v for name, v in tensors.items() if holds_numbers(v)})
        self._whole.update(checksum.encode())
        if own:
            self._own.update(checksum.encode())

    def given(self) -> dict[str, object]:
        """Number and checksum of all batches, by name."""
        return {"number of batches": len(self.counts), "data": self._whole.hexdigest()}

    def own(self) -> str:
        """The checksum of the rank's own batches."""
        return self._own.hexdigest()


def unpadded(
    batch: Batch, index: int, *, pad_token_id: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yields inputs of equal-length sequences that together hold exactly the tokens that count.

    Args:
        batch: token ids (batch, seq) or (seq,), or a mapping with `input_ids` and, where it is
            padded, an `attention_mask` (batch, seq) of ones and zeros. Other tensors, which have
            that shape (see `is_text`), go along, for the model. So does a `token_mask` of ones and
            zeros, for the sums: the model reads all tokens that are no padding, and those with a
            one count.
        index: the batch's number, for messages.
        pad_token_id: warns where a batch without a mask seems to be padded with it.

    Raises:
        BatchError: the batch has no token ids, or they are of a dtype that no embedding takes; or
            a mask does not fit them, or holds something else than ones and zeros.
    """
    inputs = inputs_of(batch)
    ids: Any = inputs.get("input_ids")
    wrong = ""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim not in (1, 2):
        wrong = "has no token ids: give a (batch, seq) integer tensor, or a mapping with input_ids"
    elif ids.dtype not in (torch.int32, torch.int64) or not holds_numbers(ids):
        wrong = f"has token ids of {ids.dtype} ({ids.layout}, on {ids.device}): give dense int64"
    if wrong:
        raise BatchError(index, wrong)
    mask, counted = (
        _checked_mask(inputs, name, index, tuple(ids.shape))
        for name in ("attention_mask", "token_mask")
    )
    fields = {
        name: value if value.ndim == 2 else value[None]
        for name, value in inputs.items()
        if name not in _DROPPED
    }
    if counted is not None and mask is None:
        mask = torch.ones_like(ids)
    if mask is None:
        _warn_padded(fields, index, pad_token_id)
        if ids.numel():
            yield fields
    else:
        kept = mask.to(torch.bool) if mask.ndim == 2 else mask[None].to(torch.bool)
        if counted is not None:  # a sequence of which nothing counts need not run
            kept = kept & (kept & fields["token_mask"].to(torch.bool)).any(1, keepdim=True)
        lengths = kept.sum(1)
        for length in filter(None, torch.unique(lengths).tolist()):
            alike = lengths == length
            yield {
                name: value[alike][kept[alike]].view(-1, length) for name, value in fields.items()
            }


@dataclass(frozen=True, eq=False)
class Piece:
    """What runs together of one batch: sequences of equal length, or all of more than text.

    Attributes:
        batch: number of the batch.
        span: range of the batch's tokens in the text.
        inputs: what the model takes; of text also a `token_mask`, see `unpadded`.
        text: whether rows of `inputs` are sequences, which can run together with others.
    """

    batch: int
    span: tuple[int, int]
    inputs: dict[str, Any]
    text: bool

    @property
    def size(self) -> float:
        """Tokens that run; of more than text no number is known, hence infinity."""
        return self.inputs["input_ids"].numel() if self.text else math.inf


def together(
    pieces: Iterable[Piece], max_rows: int | None = None
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yields inputs of forward passes, each with the numbers of the batches that its rows are of.

    Args:
        pieces: of any batches; sequences run together that have one length and the same inputs.
        max_rows: the most sequences that run together; None for as many as there are.
    """
    alike: dict[object, list[Piece]] = {}
    for piece in pieces:
        key: object = piece
        if piece.text:
            key = tuple((name, value.dtype, value.shape[1]) for name, value in piece.inputs.items())
        alike.setdefault(key, []).append(piece)
    for group in alike.values():
        first = group[0]
        if not first.text:
            yield dict(first.inputs), [first.batch]
            continue
        batches = [piece.batch for piece in group for _ in piece.inputs["input_ids"]]
        inputs = {name: torch.cat([each.inputs[name] for each in group]) for name in first.inputs}
        size = max_rows or len(batches)
        for start in range(0, len(batches), size):
            rows = slice(start, start + size)
            yield {name: value[rows] for name, value in inputs.items()}, batches[rows]


def check_masks(inputs: Mapping[str, Any], index: int, pad_token_id: int | None) -> None:
    """Refuses masks of a batch by which its padding cannot be told, and warns where one lacks.

    Raises:
        BatchError: a mask is not (batch, seq), or holds something else than ones and zeros.
    """
    for name in ("attention_mask", "decoder_attention_mask"):
        _checked_mask(inputs, name, index)
    _warn_padded(inputs, index, pad_token_id)


def _checked_mask(
    inputs: Mapping[str, Any], name: str, index: int, shape: tuple[int, ...] | None = None
) -> Tensor | None:
    """A batch's mask of that name, if it has one, which must have the shape or two dimensions."""
    mask: Tensor | None = inputs.get(name)
    if mask is None:
        return None
    fits = isinstance(mask, Tensor) and (mask.ndim == 2 if shape is None else mask.shape == shape)
    if not fits:
        wanted = "(batch, seq)" if shape is None else f"its input_ids, {shape}"
        raise BatchError(index, f"gives {name} another shape than {wanted}")
    if not ones_and_zeros(mask):
        raise BatchError(index, f"gives {name} {ODD_VALUES}")
    return mask


def _warn_padded(inputs: Mapping[str, Any], index: int, pad_token_id: int | None) -> None:
    """Warns where token ids seem to be padded, and neither a mask nor labels say where."""
    told: tuple[str, ...]
    for prefix, told in (("", ()), ("decoder_", ("labels",))):
        ids, mask = inputs.get(f"{prefix}input_ids"), f"{prefix}attention_mask"
        if not isinstance(ids, Tensor) or pad_token_id is None or inputs.keys() & {mask, *told}:
            continue
        if looks_padded(ids, pad_token_id):
            says = f"batch {index} starts or ends in padding (token {pad_token_id}) without a mask:"
            warn(f"{says} it counts as text; give {prefix}input_ids and {mask}", PaddingWarning)


def check_tokens(what: str, ids: Tensor, count: int, index: int, remedy: str) -> None:
    """Refuses a batch with numbers of tokens, on the CPU, that a model does not have."""
    odd = ids[(ids < 0) | (ids >= count)]
    if odd.numel():
        says = f"{what} {int(odd[0])}, but the model's tokens are 0 to {count - 1}"
        raise BatchError(index, f"{says}: {remedy}")


def ones_and_zeros(mask: Tensor) -> bool:
    """Whether a mask says of each token that it counts or that it does not; read on its device."""
    return holds_numbers(mask) and bool(((mask == 0) | (mask == 1)).all())


def looks_padded(ids: Tensor, pad_token_id: int) -> bool:
    """Whether a sequence of token ids (batch, seq) starts or ends in padding."""
    if ids.ndim != 2 or ids.shape[1] < 2:
        return False
    pads = ids == pad_token_id
    # One such token at an end may well be an end-of-text that doubles as padding; two in a row are
    # not.
    return bool((pads[:, :2].all(1) | pads[:, -2:].all(1)).any())
