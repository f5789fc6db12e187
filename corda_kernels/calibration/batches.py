"""Batches as calibration runs them: padding never enters the model.

A padded batch is taken apart into its sequences without their padding, and sequences of equal
length run together. That is exact for any padding side, any position encoding and any attention
kernel, needs no mask further down (where routed experts could not apply it), and computes nothing
for the padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from corda_kernels.arguments import holds_numbers
from corda_kernels.errors import BatchError, PaddingWarning
from corda_kernels.files import digest

# Not inputs of a calibration pass: the loss needs no computing, and positions follow from the
# sequence itself.
_DROPPED = ("labels", "position_ids", "attention_mask")
ODD_MASK = (
    "an attention_mask of other values than 1 (a token) and 0 (padding): turn an additive mask "
    "into one by (mask == 0)"
)


def token_count(batch: Tensor | Mapping[str, Any]) -> int:
    """Number of tokens in a batch that count: all of them, or those the attention mask keeps.

    It is 0 for a malformed batch, which `unpadded` then reports.
    """
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(mask, Tensor):
        return int(mask.count_nonzero()) if holds_numbers(mask) else 0
    return ids.numel() if isinstance(ids, Tensor) else 0


def batch_digest(batch: Tensor | Mapping[str, Any]) -> str:
    """A checksum over all tensors of a batch, by their names."""
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    return digest(
        {
            name: value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and holds_numbers(value)
        }
    )


def unpadded(
    batch: Tensor | Mapping[str, Any],
    index: int,
    *,
    pad_token_id: int | None = None,
    max_rows: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yields inputs of equal-length sequences that together hold exactly the tokens that count.

    Args:
        batch: token ids (batch, seq) or (seq,), or a mapping with `input_ids` and, where it is
            padded, an `attention_mask` (batch, seq) of ones and zeros. Other tensors of that shape
            are passed on to the model.
        index: the batch's number, for messages.
        pad_token_id: warns where a batch without a mask seems to be padded with it.
        max_rows: the most sequences that run together; None for as many as there are.

    Raises:
        BatchError: the batch has no token ids, or they are of a dtype that no embedding takes; or
            its mask does not fit them, or holds something else than ones and zeros.
    """
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim not in (1, 2):
        raise BatchError(
            index,
            "has no token ids: give a (batch, seq) integer tensor, or a mapping with input_ids",
        )
    if ids.dtype not in (torch.int32, torch.int64) or not holds_numbers(ids):
        raise BatchError(
            index,
            f"has token ids of {ids.dtype} ({ids.layout}, on {ids.device}): give dense int64 ones, "
            "by .long()",
        )
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise BatchError(
            index,
            f"has an attention_mask of another shape than its input_ids, {tuple(ids.shape)}",
        )
    if mask is not None and not ones_and_zeros(mask):
        raise BatchError(index, f"has {ODD_MASK}")
    fields = {
        name: value if value.ndim == 2 else value[None]
        for name, value in inputs.items()
        if name not in _DROPPED and isinstance(value, Tensor) and value.shape == ids.shape
    }
    if mask is None:
        _warn_of_padding(fields["input_ids"], index, pad_token_id)
        if ids.numel():
            yield from _split(fields, max_rows)
        return
    kept = mask.to(torch.bool) if mask.ndim == 2 else mask[None].to(torch.bool)
    lengths = kept.sum(1)
    for length in torch.unique(lengths).tolist():
        if length:
            rows = lengths == length
            alike = {
                name: value[rows][kept[rows]].view(-1, length) for name, value in fields.items()
            }
            yield from _split(alike, max_rows)


def ones_and_zeros(mask: Tensor) -> bool:
    """Whether a mask says of each token that it counts or that it does not; read on its device."""
    return holds_numbers(mask) and bool(((mask == 0) | (mask == 1)).all())


def _split(fields: dict[str, Tensor], max_rows: int | None) -> Iterator[dict[str, Tensor]]:
    rows = fields["input_ids"].shape[0]
    size = max_rows or rows
    for start in range(0, rows, size):
        yield {name: value[start : start + size] for name, value in fields.items()}


def looks_padded(ids: Tensor, pad_token_id: int) -> bool:
    """Whether a sequence of token ids (batch, seq) starts or ends in padding."""
    if ids.ndim != 2 or ids.shape[1] < 2:
        return False
    pads = ids == pad_token_id
    # One such token at an end may well be an end-of-text that doubles as padding; two in a row are
    # not.
    return bool((pads[:, :2].all(1) | pads[:, -2:].all(1)).any())


def _warn_of_padding(ids: Tensor, index: int, pad_token_id: int | None) -> None:
    if pad_token_id is not None and looks_padded(ids, pad_token_id):
        warnings.warn(
            f"batch {index} starts or ends in padding (token {pad_token_id}) but has no attention "
            "mask: the padding counts as text and inflates the covariances; pass a mapping with "
            "input_ids and attention_mask",
            PaddingWarning,
            stacklevel=6,  # the caller of calibrate, which no_grad wraps
        )
