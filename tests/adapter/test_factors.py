"""The plain form: a LoRA that starts at zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factor_cases import (
    ENDS,
    LAYERS,
    RANK,
    SHAPES,
    halves,
    layer,
    of_tokens,
    product,
    random,
    span,
)
from pairs import pairwise
from torch import Tensor

from corda_kernels import CordaConfig
from corda_kernels.adapter.factors import AdapterFactors, adapter_factors
from corda_kernels.adapter.published import published_factors
from corda_kernels.errors import ConfigError
from corda_kernels.linalg import CoSVD, co_svd

HOLDS = [1, 8, 0.25]


def two_sided(
    name: str, shape: tuple[int, int], which: str, rank: int = RANK, power: float = 1.0
) -> tuple[Tensor, CoSVD]:
    W, C = LAYERS[name](*shape)
    D = 1e4 * of_tokens(4 * shape[0], shape[0])
    return W, co_svd(W, C, rank=rank, which=which, power=power, output_covariance=D)


def gradients(factors: AdapterFactors, G: Tensor) -> AdapterFactors:
    """Those of A and B where G is the loss's gradient of W + scaling·B·A."""
    A, B = factors.A.clone().requires_grad_(), factors.B.clone().requires_grad_()
    (factors.scaling * (B @ A)).backward(G)
    assert A.grad is not None
    assert B.grad is not None
    return AdapterFactors(A.grad, B.grad)


@pairwise(shape=SHAPES, which=ENDS, hold=HOLDS, name=list(LAYERS))
def test_any_layer_gets_a_lora_of_twice_the_rank_that_starts_at_exactly_zero(
    name: str, hold: float, which: str, shape: tuple[int, int]
) -> None:
    W, _, found = layer(name, shape, which)
    factors = adapter_factors(W, found, hold=hold)
    assert (factors.A.shape, factors.B.shape) == ((2 * RANK, shape[1]), (shape[0], 2 * RANK))
    assert factors.A.dtype == factors.B.dtype == torch.float64
    assert factors.scaling == 1 / hold
    assert bool(torch.isfinite(factors.A).all() & torch.isfinite(factors.B).all())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        cast = factors.to(dtype)
        assert not bool((cast.B @ cast.A).any())
        assert not bool(cast.product().any())


@pairwise(shape=SHAPES, which=ENDS, hold=HOLDS)
def test_the_first_steps_are_those_of_the_published_factors(
    hold: float, which: str, shape: tuple[int, int]
) -> None:
    W, _, found = layer("well_conditioned", shape, which)
    factors = adapter_factors(W, found, hold=hold)
    P, Q, R, S = halves(factors)
    assert not bool(Q.any())
    assert not bool(R.any())
    G = random(*shape)
    grad = gradients(factors, G)
    of_P, of_Q, of_R, of_S = halves(AdapterFactors(grad.A, grad.B))
    torch.testing.assert_close(of_R, P.mT @ G / hold)
    torch.testing.assert_close(of_Q, G @ S.mT / hold)
    assert not bool(of_P.any())
    assert not bool(of_S.any())
    # Row by row those of the published A, and column by column those of its B, but for their size.
    published = gradients(published_factors(W, found), G)
    cosine = torch.nn.functional.cosine_similarity
    ones = torch.ones(RANK, dtype=torch.float64)
    torch.testing.assert_close(cosine(of_R, published.A, 1), ones)
    torch.testing.assert_close(cosine(of_Q, published.B, 0), ones)


@pairwise(shape=SHAPES, which=ENDS, hold=HOLDS)
def test_p_and_s_span_the_component(hold: float, which: str, shape: tuple[int, int]) -> None:
    W, _, found = layer("well_conditioned", shape, which)
    P, _, _, S = halves(adapter_factors(W, found, hold=hold))
    torch.testing.assert_close(span(P.mT), span(found.U.mT))
    torch.testing.assert_close(span(S), span(found.U.mT @ W))
    # Each component by itself, so that a schedule can take components away.
    ones = torch.ones(RANK, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(P, found.U, 0), ones)
    torch.testing.assert_close(cosine(S, found.U.mT @ W, 1), ones)


@pairwise(shape=SHAPES, which=ENDS, hold=HOLDS)
def test_p_and_s_have_the_rms_of_loras_own_start_times_hold(
    hold: float, which: str, shape: tuple[int, int]
) -> None:
    out, channels = shape
    W, C, found = layer("well_conditioned", shape, which)
    factors = adapter_factors(W, found, hold=hold)
    P, _, _, S = halves(factors)
    for vectors, width in ((P.mT, out), (S, channels)):
        rms = vectors.square().mean(1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, hold / (3 * width) ** 0.5))
        lora = torch.nn.init.kaiming_uniform_(torch.empty(400, width).double(), a=5**0.5)
        assert float(rms[0]) == pytest.approx(hold * float(lora.square().mean().sqrt()), rel=0.03)
    # Neither the units of the covariance nor the size of the weight count.
    scaled = adapter_factors(1e-6 * W, co_svd(1e-6 * W, 100 * C, rank=RANK, which=which), hold=hold)
    sign = (factors.B * scaled.B).sum(0)[:RANK].sign()
    torch.testing.assert_close(halves(scaled)[0] * sign, P)
    torch.testing.assert_close(halves(scaled)[3] * sign[:, None], S)


def signs_of(like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape, dtype=torch.float64) * 2 - 1


def first_step_of_adam(factors: AdapterFactors, rate: float = 1e-7) -> float:
    """‖ΔW‖ over the rate when every entry that has a gradient moves by it, either way."""
    moving = gradients(factors, random(factors.B.shape[0], factors.A.shape[1]))
    A = factors.A + rate * signs_of(factors.A) * (moving.A != 0)
    B = factors.B + rate * signs_of(factors.B) * (moving.B != 0)
    return float((factors.scaling * (B @ A) - product(factors)).norm()) / rate


@pairwise(shape=SHAPES, which=ENDS, hold=HOLDS, name=["well_conditioned", "dead_channels"])
def test_the_first_step_moves_the_weight_by_a_root_of_two_more_than_loras(
    name: str, hold: float, which: str, shape: tuple[int, int]
) -> None:
    out, channels = shape
    W, _, found = layer(name, shape, which)
    factors = adapter_factors(W, found, hold=hold)
    steps = [first_step_of_adam(factors) for _ in range(40)]
    # R moves (2r rows of LoRA, half of which count) and Q does.
    expected = (RANK * (out + channels) / 3) ** 0.5
    assert sum(steps) / 40 == pytest.approx(expected, rel=0.03)

    plain = torch.nn.init.kaiming_uniform_(torch.empty(RANK, channels).double(), a=5**0.5)
    lora = AdapterFactors(plain, torch.zeros(out, RANK, dtype=torch.float64))
    steps = [first_step_of_adam(lora) for _ in range(40)]
    assert sum(steps) / 40 == pytest.approx((out * RANK / 3) ** 0.5, rel=0.1)


def moved_out_of_the_tangent_space(hold: float) -> float:
    """Its share of ‖ΔW‖² after some steps of Adam towards another weight."""
    torch.manual_seed(0)
    W, _, found = layer("well_conditioned", (40, 64), "smallest")
    start = adapter_factors(W, found, hold=hold)
    A, B = start.A.clone().requires_grad_(), start.B.clone().requires_grad_()
    target = random(40, 64)
    optimizer = torch.optim.Adam([A, B], lr=0.02)
    for _ in range(30):
        (start.scaling * (B @ A) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    change = (B @ A).detach()
    outside = change - span(found.U.mT) @ change
    outside = outside - outside @ span(found.U.mT @ W)
    return float(outside.square().sum() / change.square().sum())


def test_a_firmer_hold_keeps_more_of_the_change_in_the_tangent_space() -> None:
    shares = [moved_out_of_the_tangent_space(hold) for hold in (1, 4, 16)]
    assert all(less < 0.7 * more for more, less in itertools.pairwise(shares))


DEAD: dict[str, Callable[[], tuple[Tensor, CoSVD]]] = {
    "rank of the weight": lambda: layer("low_rank_weight", (40, 64), "largest", 9)[::2],
    "rank of the weight, smallest": lambda: layer("low_rank_weight", (40, 64), "smallest")[::2],
    "zero weight": lambda: layer("zero_weight", (40, 64), "largest")[::2],
    "one token": lambda: layer("single_token", (40, 64), "largest")[::2],
    "one token, smallest": lambda: layer("single_token", (64, 40), "smallest")[::2],
    "no token": lambda: layer("zero_covariance", (40, 64), "largest")[::2],
    "two-sided, rank of the weight": lambda: two_sided("low_rank_weight", (40, 64), "largest", 9),
    "two-sided, smallest": lambda: two_sided("low_rank_weight", (40, 64), "smallest"),
    "two-sided, zero weight": lambda: two_sided("zero_weight", (40, 64), "largest"),
    "two-sided, one token": lambda: two_sided("single_token", (40, 64), "largest"),
    "two-sided, no token": lambda: two_sided("zero_covariance", (40, 64), "largest"),
}


@pytest.mark.parametrize("case", DEAD)
def test_components_that_vanish_are_finite_and_can_train(case: str) -> None:
    W, found = DEAD[case]()
    assert float(found.S.min()) < 1e-9
    factors = adapter_factors(W, found, hold=2)
    P, _, _, S = halves(factors)
    assert bool(torch.isfinite(factors.A).all() & torch.isfinite(factors.B).all())
    torch.testing.assert_close(P.norm(dim=0), torch.full_like(found.S, 2 / 3**0.5))
    lengths = S.norm(dim=1)
    dead = lengths == 0
    torch.testing.assert_close(lengths[~dead], torch.full_like(lengths[~dead], 2 / 3**0.5))
    moving = gradients(factors, random(*W.shape))
    assert bool((halves(AdapterFactors(moving.A, moving.B))[2] != 0).any(1).all())


def test_only_components_that_the_weight_lacks_get_a_row_of_zeros() -> None:
    for W, found in (DEAD["rank of the weight"](), DEAD["two-sided, rank of the weight"]()):
        S = halves(adapter_factors(W, found))[3]
        assert bool((S[:3] != 0).any(1).all())
        assert not bool(S[3:].any())
    # σ = 0, and yet the weight has them.
    W, found = DEAD["one token"]()
    assert bool((halves(adapter_factors(W, found))[3] != 0).any(1).all())


@pairwise(shape=SHAPES, which=ENDS, hold=HOLDS, power=[0.5, 1.0])
def test_a_two_sided_decomposition_gives_the_directions_of_its_oblique_projection(
    power: float, hold: float, which: str, shape: tuple[int, int]
) -> None:
    W, found = two_sided("well_conditioned", shape, which, power=power)
    assert found.dual is not None
    factors = adapter_factors(W, found, hold=hold)
    P, _, _, S = halves(factors)
    torch.testing.assert_close(span(P.mT), span(found.U.mT))
    torch.testing.assert_close(span(S), span(found.dual.mT @ W))
    lengths = torch.full((RANK,), hold / 3**0.5, dtype=torch.float64)
    torch.testing.assert_close(P.norm(dim=0), lengths)
    torch.testing.assert_close(S.norm(dim=1), lengths)


@pytest.mark.parametrize("hold", [0, 0.0, -1, float("nan"), float("inf"), True, "x", None])
def test_a_hold_that_is_no_positive_number_is_refused(hold: Any) -> None:
    W, _, found = layer("well_conditioned", (40, 64), "largest")
    with pytest.raises(ConfigError, match="hold must be positive and finite, such as 1 or 16, got"):
        adapter_factors(W, found, hold=hold)
    with pytest.raises(ConfigError, match="hold must be positive and finite, such as 1 or 16, got"):
        CordaConfig("ipm", hold=hold)


@pytest.mark.parametrize("make", [adapter_factors, published_factors])
def test_factors_do_not_hang_on_the_weights_graph_nor_on_autocast(
    make: Callable[..., AdapterFactors],
) -> None:
    W, _, found = layer("well_conditioned", (40, 64), "largest")
    W = W.float()
    plain = make(W, found)
    with torch.autocast("cpu", torch.bfloat16):
        same = make(W.requires_grad_(), found)
    assert not any(factor.requires_grad for factor in (same.A, same.B))
    assert torch.equal(same.A, plain.A)
    assert torch.equal(same.B, plain.B)
