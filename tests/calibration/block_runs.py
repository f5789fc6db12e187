"""Runs of a tiny model block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from corda_kernels import CovarianceSet
from corda_kernels.calibration.blocks import calibrate_block_parts

FIXED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {
        "sliding_window": 4,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {},
}


def random_batches() -> list[Any]:
    """Batches of several lengths, longer than any sliding window, one of them padded."""
    padded = {
        "input_ids": torch.randint(3, 64, (3, 14)),
        "attention_mask": (torch.arange(14) < torch.tensor([[9], [14], [3]])).long(),
    }
    return [torch.randint(3, 64, (4, 12)), padded, torch.randint(3, 64, (2, 20))]


def stream(model: nn.Module, batches: Iterable[Any], **options: Any) -> list[list[CovarianceSet]]:
    options = {"parts": 1, "outlier_threshold": 1.0, "progress": False} | options
    return list(calibrate_block_parts(model, batches, **options))
