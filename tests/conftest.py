"""Fixtures that several test files share: repeatable randomness and tiny random models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_SIZES = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "qwen3": _SIZES,
    "mistral": _SIZES,
    "gemma2": _SIZES,
    "gpt2": _GPT2_SIZES,
    "mixtral": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """A fixed seed, and NaN in all memory that torch hands out unwritten, so that it shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., torch.nn.Module]:
    """Makes a random causal language model: an architecture's name and changes of its sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(architecture: str, **changes: Any) -> torch.nn.Module:
        config = AutoConfig.for_model(architecture, **(_MODELS[architecture] | changes))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make
