"""A configuration of PEFT's CorDA, token ids, and a `run_model`, as users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(targets: Any = LAYERS, *, method: str = "ipm", **corda: Any) -> LoraConfig:
    return LoraConfig(
        r=4,
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method, **corda),
    )


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def running(model: nn.Module, *batches: Any) -> Callable[[], None]:
    """A `run_model` as users write it."""

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)

    return run
