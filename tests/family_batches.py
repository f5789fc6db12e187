"""Batches for tiny models: texts, images, sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]


def ids(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(5, 50, (rows, length))


def text() -> Batch:
    """Three texts, one of them padded."""
    mask = torch.ones(3, 12).long()
    mask[1, 9:] = 0
    return {"input_ids": ids() * mask, "attention_mask": mask}


def pair() -> Batch:
    return text() | {"labels": ids()}


def images() -> Batch:
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


def captioned() -> Batch:
    return {"input_ids": ids(), **images()}


def waves() -> Batch:
    return {"input_values": torch.randn(2, 800)}


def spectra() -> Batch:
    return {"input_features": torch.randn(3, 8, 40), "labels": ids()}


def frames() -> Batch:
    return {"input_features": torch.randn(3, 40, 8), "labels": ids()}


def seen(tokens: int, pixels: tuple[int, ...] = (2, 3, 16, 16), **more: Any) -> Callable[[], Batch]:
    """Two images of `tokens` tokens each, and text behind them."""

    def make() -> Batch:
        row = torch.cat([torch.full((2, tokens), 59), ids(2, 8)], 1)
        batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        given = {name: torch.tensor([value, value]) for name, value in more.items()}
        return batch | {"pixel_values": torch.randn(pixels)} | given

    return make


def typed(make: Callable[[], Batch], name: str) -> Callable[[], Batch]:
    """The same with a mask of the image's tokens."""

    def made() -> Batch:
        batch = make()
        return batch | {name: (batch["input_ids"] == 59).long()}

    return made


def qwen_seen() -> Batch:
    row = torch.cat([torch.tensor([58, 59, 59, 57]).expand(2, 4), ids(2, 8)], 1)
    # 2 × 4 patches an image, of which four are merged to a token.
    patches, grid = torch.randn(16, 3 * 2 * 4 * 4), torch.tensor([[1, 2, 4]] * 2)
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    return batch | {
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": (row == 59).long(),
    }


def heard(tokens: int, **more: Tensor) -> Callable[[], Batch]:
    """Two sounds of `tokens` tokens each, and text behind them."""

    def make() -> Batch:
        row = torch.cat([torch.full((2, tokens), 59), ids(2, 6)], 1)
        batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        return batch | {"input_features": torch.randn(2, 8, 40)} | more

    return make


def noised() -> Batch:
    return images() | {"noise": torch.rand(3, 16)}


def florence_seen() -> Batch:
    row = torch.cat([torch.full((2, 17), 59), ids(2, 6)], 1)
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    return batch | {"pixel_values": torch.randn(2, 3, 32, 32), "labels": ids(2, 8)}
