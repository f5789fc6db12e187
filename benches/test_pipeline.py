"""From tokens to factors: `corda_adapter` against PEFT's `preprocess_corda`, on a small LLaMA.

The error is that of B A relative to float64 for IPM, and for KPM the norm of the tail over the
least possible, less 1: the worst layer, each contestant on its own covariances. Nothing is attached
yet, so that rounds can be repeated. `benches/pipeline.py` takes a real model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from conftest import DEVICE, Contest, Sized
from svd import published_missing
from svd_cases import (
    DAMPING,
    adapter_error,
    reference,
    tail_energy_ratio,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from corda_kernels import CordaConfig, calibrate
from corda_kernels.init import corda_adapter
from corda_kernels.linears import linear_weight
from corda_kernels.targets import target_linears

Mode = Literal["ipm", "kpm"]
# Of every layer B and A, whose product is the adapter's start.
Factors = dict[str, tuple[Tensor, Tensor]]

RANK, SAMPLES, LENGTH = 16, 8, 256


@pytest.fixture(scope="module")
def model(sized: Sized) -> nn.Module:
    torch.manual_seed(0)
    width = sized(384)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=sized(1024),
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.1,  # large enough that every layer counts
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(DEVICE)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["peft", "ours"])
def test_pipeline(
    contest: Contest[Factors], sized: Sized, model: nn.Module, name: str, mode: Mode
) -> None:
    rank = sized(RANK)
    batches = list(torch.randint(0, 1024, (SAMPLES, 1, LENGTH), device=DEVICE))
    layers = target_linears(model)
    if name == "peft":
        run, covariances = peft(model, layers, batches, mode, rank)
    else:
        run, covariances = ours(model, batches, mode, rank)

    def error(found: Factors) -> float:
        matrices = covariances()
        errors = []
        for layer, (B, A) in found.items():
            exact = reference(linear_weight(layers[layer]), matrices[layer], DAMPING)
            if mode == "ipm":
                errors.append(adapter_error(B.double() @ A.double(), exact, "largest", rank))
            else:
                errors.append(tail_energy_ratio(torch.linalg.qr(B.double()).Q, exact) - 1)
        return max(errors)

    width = model.config.hidden_size
    contest(f"pipeline, {len(layers)} layers of width {width}, {mode}", run, error)


def ours(
    model: nn.Module, batches: list[Tensor], mode: Mode, rank: int
) -> tuple[Callable[[], Factors], Callable[[], dict[str, Tensor]]]:
    def run() -> Factors:
        # The published form has factors whose product can be compared.
        config = CordaConfig(
            mode,
            rank=rank,
            residual="weight",
            damping=DAMPING,
            stability=False,
            progress=False,
        )
        made = corda_adapter(model, batches, config).layers
        return {name: (layer.B, layer.A) for name, layer in made.items()}

    def covariances() -> dict[str, Tensor]:
        found = calibrate(model, batches, progress=False)
        return {name: covariance.matrix for name, covariance in found.items()}

    return run, covariances


def peft(
    model: nn.Module, layers: dict[str, Any], batches: list[Tensor], mode: Mode, rank: int
) -> tuple[Callable[[], Factors], Callable[[], dict[str, Tensor]]]:
    missing = published_missing()
    if missing is not None:
        pytest.skip(f"PEFT's CorDA cannot be imported: {missing}")
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    options = PeftCordaConfig(corda_method=mode, prune_temporary_fields=False)
    config = LoraConfig(
        r=rank, target_modules=list(layers), init_lora_weights="corda", corda_config=options
    )

    def forward() -> None:
        for ids in batches:
            model(input_ids=ids, use_cache=False)

    def run() -> Factors:
        preprocess_corda(model, config, forward)
        eigens = {name: layer.eigens for name, layer in layers.items()}
        return {
            name: (found.U_WC, found.S_WC[:, None] * found.V_WC.T) for name, found in eigens.items()
        }

    return run, lambda: {name: layer.covariance_matrix for name, layer in layers.items()}
