"""Adapters of fused experts, in both of their orientations, beside those of linear layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    init_corda,
    load_for_training,
    merge,
    save_adapter,
)
from corda_kernels.calibration import Covariance
from corda_kernels.calibration.expert_layers import expert_names
from corda_kernels.experts import expert_parameters
from corda_kernels.linears import linear_shape
from corda_kernels.models import target_linears

pytestmark = [
    # It looks for the names of parameters among those of modules.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_LATENT = {
    "head_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": _DEEPSEEK | _LATENT,
    "glm4_moe": _DEEPSEEK,
    "gpt_oss": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 24},
    "granitemoe": {"num_local_experts": 4},
}


def tiny(architecture: str) -> nn.Module:
    config = AutoConfig.for_model(architecture, **(_SIZES | MODELS[architecture]))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def covariance(width: int) -> Covariance:
    x = torch.randn(96, width) * torch.logspace(0, -1, width)
    return Covariance(x.T @ x / 96, 96, 1, x.abs().amax(0), torch.zeros(width).long(), 6.0)


def covariances(model: nn.Module) -> CovarianceSet:
    """What experts read of the hidden states is shared, what their down_proj reads is not."""
    found = {name: covariance(linear_shape(m)[1]) for name, m in linear_targets(model).items()}
    for name, parameter in expert_parameters(model).items():
        names = [name] if parameter.takes_hidden else expert_names(name, parameter)
        found |= {each: covariance(parameter.inputs) for each in names}
    return CovarianceSet(found)


def linear_targets(model: nn.Module) -> dict[str, nn.Module]:
    """Without a gate of one output, which has no rank of 4, and a router that returns a tuple."""
    left_out = ("shared_expert_gate", "feed_forward.router", "block_sparse_moe.router.layer")
    found = target_linears(model)
    return {name: module for name, module in found.items() if not name.endswith(left_out)}


def config(mode: Any = "ipm", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"rank": 4, "experts": "shared", "progress": False} | options))


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(model: nn.Module, rate: float = 0.05) -> Tensor:
    """Its logits after two steps that change them a lot."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(2):
        ids = torch.randint(3, 64, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("architecture", MODELS)
def test_experts_start_at_the_base_and_go_the_whole_way(
    architecture: str, mode: str, tmp_path: Path
) -> None:
    base = tiny(architecture)
    plain, before = copy.deepcopy(base), logits(base)
    linears, parameters = linear_targets(base), expert_parameters(base)
    model = init_corda(base, covariances(base), config(mode, targets=list(linears)))
    assert isinstance(model, PeftModel)
    assert model.corda_record.layers.keys() == linears.keys() | parameters.keys()
    assert {model.corda_record.layers[name]["rank"] for name in parameters} == {2}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    after = trained(model)
    assert (after - before).norm() > 0.05 * before.norm()
    save_adapter(model, tmp_path / "adapter")
    for load in (PeftModel.from_pretrained, load_for_training):
        again = load(copy.deepcopy(plain), tmp_path / "adapter")
        torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(again)), after, rtol=1e-4, atol=1e-4)
