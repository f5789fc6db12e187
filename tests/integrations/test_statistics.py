"""Each statistic against its direct formula on the raw activations, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels import CovarianceSet, calibrate
from corda_kernels.errors import ConfigError, CovarianceError, DecompositionError, RankError
from corda_kernels.integrations.statistics import (
    eva_components,
    gptq_hessians,
    smoothquant_scales,
    svd_llm_whitening,
    wanda_norms,
)

SHARED = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


@pytest.fixture(scope="module")
def gathered(
    tiny_model: Callable[..., nn.Module],
) -> tuple[nn.Module, CovarianceSet, dict[str, Tensor]]:
    """A model, its covariances, and all that each layer read, (tokens, in) float64."""
    torch.manual_seed(0)
    model = tiny_model("llama", initializer_range=0.1)
    raw: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: raw.setdefault(name, []).append(
                args[0].detach().double().flatten(0, 1)
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    covariances = calibrate(model, torch.randint(3, 64, (4, 8, 16)), progress=False)
    for handle in handles:
        handle.remove()
    return model, covariances, {name: torch.cat(raw[name]) for name in covariances}


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


def test_gptq_hessians(gathered: Any) -> None:
    _, covariances, raw = gathered
    for name, H in gptq_hessians(covariances).items():
        close(H, 2 * raw[name].T @ raw[name] / len(raw[name]))


def test_svd_llm_whitening(gathered: Any) -> None:
    model, covariances, raw = gathered
    for name, S in svd_llm_whitening(covariances).items():
        X = raw[name]
        close(S @ S.T, X.T @ X)
        assert torch.equal(S, S.tril())
        white = torch.linalg.solve_triangular(S, X.T, upper=False)
        error = white @ white.T - torch.eye(len(S), dtype=torch.float64)
        assert error.norm() <= 1e-6 * torch.linalg.cond(X.T @ X)  # C is kept in float32
        # Its purpose: what truncation loses is what it cuts off.
        W = model.get_submodule(name).weight.detach().double()
        U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
        cut = (U[:, :5] * sigma[:5]) @ Vh[:5] @ torch.linalg.inv(S)
        close(((W - cut) @ X.T).norm(), sigma[5:].norm())


def test_wanda_norms(gathered: Any) -> None:
    _, covariances, raw = gathered
    for name, norms in wanda_norms(covariances).items():
        close(norms, raw[name].norm(dim=0))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smoothquant_scales(gathered: Any, alpha: float) -> None:
    model, covariances, raw = gathered
    scales = smoothquant_scales(model, covariances, alpha=alpha)
    for name, scale in scales.items():
        together = SHARED if name in SHARED else [name]
        if name in SHARED or name.endswith(("o_proj", "down_proj")):
            weights = torch.cat([model.get_submodule(other).weight for other in together])
            height = weights.detach().abs().amax(0).double()
            close(scale, raw[name].abs().amax(0) ** alpha / height ** (1 - alpha))
    assert all(scales[name] is scales[SHARED[0]] for name in SHARED)


def test_smoothquant_gives_dead_channels_a_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data[:, 1] = 0
    x = torch.randn(20, 4)
    x[:, 0] = 0
    with torch.no_grad():
        from corda_kernels.calibration.capture import InputCapture

        with InputCapture({"0": model[0]}) as capture:
            model(x)
        covariances = CovarianceSet(capture.covariances())
    scale = smoothquant_scales(model, covariances)["0"]
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_eva_components(gathered: Any, rank: int) -> None:
    _, covariances, raw = gathered
    for name, found in eva_components(covariances, rank=rank).items():
        _, sigma, Vh = torch.linalg.svd(raw[name], full_matrices=False)
        close(found.singular_values, sigma[:rank])
        close(found.explained, sigma[:rank].square() / sigma.square().sum())
        close(found.components @ found.components.T, torch.eye(rank, dtype=torch.float64))
        # Directions of nearly equal strength may turn among themselves: compare what they capture.
        close((raw[name] @ found.components.T).norm(), (raw[name] @ Vh[:rank].T).norm())


def test_layers_that_share_an_input_share_the_result(gathered: Any) -> None:
    _, covariances, _ = gathered
    for compute in (gptq_hessians, svd_llm_whitening, wanda_norms):
        found = compute(covariances)
        assert list(found) == list(covariances)
        assert len({id(value) for value in found.values()}) == len(covariances.groups()) == 8


def test_errors_name_the_layer(gathered: Any) -> None:
    model, covariances, _ = gathered
    with pytest.raises(RankError, match=r"rank 40 is not possible for layer model\.layers\.0"):
        eva_components(covariances, rank=40)
    with pytest.raises(ConfigError, match="alpha must be between 0 and 1"):
        smoothquant_scales(model, covariances, alpha=1.5)
    with pytest.raises(CovarianceError, match=r"the model has no layer model\.layers"):
        smoothquant_scales(nn.Sequential(), covariances)
    peft = calibrate(model, torch.randint(3, 64, (1, 1, 16)), normalize="peft", progress=False)
    with pytest.raises(CovarianceError, match='taken with normalize="peft"'):
        gptq_hessians(peft)
    few = calibrate(model, torch.randint(3, 64, (1, 1, 4)), progress=False)
    with pytest.raises(DecompositionError, match=r"model\.layers\.0.* is singular .* a damping"):
        svd_llm_whitening(few)
    assert torch.isfinite(svd_llm_whitening(few, damping=0.01)[SHARED[0]]).all()
