from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels import CordaConfig, CovarianceSet, init_corda
from corda_kernels.decomposition import co_svd
from corda_kernels.initialization import AdapterFactors, LayerAdapter, adapter_factors, residual
from corda_kernels.initialization.rounding import compensated

NARROW = [torch.bfloat16, torch.float16]
ENDS = ["largest", "smallest"]
OUT, IN, RANK = 48, 40, 6


def covariance(*, dead: int = 0, tokens: int = 400) -> Tensor:
    """Of inputs with a few strong directions, as activations have them."""
    x = torch.randn(tokens, IN, dtype=torch.float64)
    x = (
        x
        @ torch.diag(torch.logspace(0, -3, IN, dtype=torch.float64))
        @ torch.randn(IN, IN).double()
    )
    x[:, IN - dead :] = 0
    return x.T @ x / tokens


def layer(
    weight: Tensor, C: Tensor, which: str, step: Any = None
) -> tuple[AdapterFactors, AdapterFactors]:
    """Factors as initialised, in float32, and those to start from."""
    part = co_svd(weight, C, rank=RANK, which=which, damping=0.01)
    factors = LayerAdapter.fresh(adapter_factors(weight, part, step=step)).initial()
    return factors, compensated(weight, factors, C)


def missed(weight: Tensor, factors: AdapterFactors, start: AdapterFactors, C: Tensor) -> float:
    """Mean square of what the rounded residual and the starting factors do to the output."""
    product = start.scaling * (start.B.double() @ start.A.double())
    error = residual(weight, factors).double() + product - weight.double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(IN, dtype=C.dtype)
    return float(((error @ C) * error).sum())


@pytest.mark.parametrize("step", [None, "lora"])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_start_is_nearer_to_the_base(dtype: torch.dtype, which: str, step: Any) -> None:
    weight, C = torch.randn(OUT, IN).to(dtype), covariance()
    factors, start = layer(weight, C, which, step)
    before = missed(weight, factors, factors, C)
    # A rank of 6 can take up six of 40 directions of the inputs, and six of 48 of the outputs.
    most = 0.2 if which == "largest" else 0.9
    assert missed(weight, factors, start, C) < most * before
    assert start.scaling == factors.scaling
    assert (start.A.shape, start.B.shape) == (factors.A.shape, factors.B.shape)


@pytest.mark.parametrize("which", ENDS)
def test_neither_factor_can_be_improved_on(which: str) -> None:
    weight, C = torch.randn(OUT, IN).bfloat16(), covariance()
    factors, start = layer(weight, C, which)
    best = missed(weight, factors, start, C)
    for _ in range(20):
        A = start.A + 1e-4 * torch.randn_like(start.A)
        assert missed(weight, factors, AdapterFactors(A, start.B), C) > best
    # B is the best for the A that it was found with.
    half = AdapterFactors(factors.A.double(), start.B)
    best = missed(weight, factors, half, C)
    for _ in range(20):
        B = start.B + 1e-4 * torch.randn_like(start.B)
        assert missed(weight, factors, AdapterFactors(half.A, B), C) > best


DEGENERATE: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "zero weight": (lambda: torch.zeros(OUT, IN), covariance),
    "low-rank weight": (lambda: torch.randn(OUT, 3) @ torch.randn(3, IN), covariance),
    "dead channels": (lambda: torch.randn(OUT, IN), lambda: covariance(dead=30)),
    "one token": (lambda: torch.randn(OUT, IN), lambda: covariance(tokens=1)),
    "no tokens": (lambda: torch.randn(OUT, IN), lambda: torch.zeros(IN, IN).double()),
}


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("balance", ["even", "paper"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_layers_get_finite_factors_no_worse(name: str, which: str, balance: Any) -> None:
    make_weight, make_covariance = DEGENERATE[name]
    weight, C = make_weight().bfloat16(), make_covariance()
    part = co_svd(weight, C, rank=RANK, which=which)
    made = adapter_factors(weight, part, balance=balance)
    factors = LayerAdapter.fresh(made).initial()
    start = compensated(weight, factors, C)
    assert bool(torch.isfinite(start.A).all() & torch.isfinite(start.B).all())
    before = missed(weight, factors, factors, C)
    assert missed(weight, factors, start, C) <= before * (1 + 1e-9)


@pytest.mark.parametrize("which", ENDS)
def test_how_the_factors_share_their_magnitude_does_not_matter(which: str) -> None:
    weight, C = torch.randn(OUT, IN).bfloat16(), covariance()
    factors, start = layer(weight, C, which)
    lengths = torch.logspace(-8, 8, RANK)
    other = AdapterFactors(factors.A * lengths[:, None], factors.B / lengths)
    found = compensated(weight, other, C)
    product = start.B @ start.A
    # The products of the factors in float32 differ in their last bits.
    assert (found.B @ found.A - product).norm() < 1e-6 * product.norm()


def test_where_nothing_is_rounded_nothing_changes() -> None:
    weight, C = torch.randn(OUT, IN), covariance()
    factors, start = layer(weight, C, "largest")
    assert start is factors


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_initial_narrow_model_is_nearer_to_the_base(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
    logits: Callable[[nn.Module], Tensor],
    architecture: str,
    mode: Any,
    use_peft: bool,
) -> None:
    model, covariances = calibrated(architecture)
    base = model.bfloat16()
    config = CordaConfig(mode, rank=4, residual="weight", progress=False)

    def start(compensate: bool) -> Tensor:
        """Logits in float64 arithmetic, so that nothing but the weights is rounded."""
        made = init_corda(copy.deepcopy(base), covariances, config, use_peft=False)
        for layer in made.modules():
            if hasattr(layer, "A0") and not compensate:
                layer.A.data, layer.B.data = layer.A0.clone(), layer.B0.clone()
        return logits(made.double())

    exact = logits(copy.deepcopy(base).double())
    if use_peft:
        made = init_corda(copy.deepcopy(base), covariances, config)
        torch.testing.assert_close(logits(made.double()), start(True), rtol=1e-9, atol=1e-9)
    assert (start(True) - exact).norm() < 0.95 * (start(False) - exact).norm()
