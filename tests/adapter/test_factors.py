from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from corda_kernels import CordaConfig
from corda_kernels.adapter.factors import (
    AdapterFactors,
    adapter_factors,
    published_factors,
    residual,
)
from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.linalg import CoSVD, co_svd

RANK = 6
SHAPES = [(40, 64), (48, 48), (64, 40)]
HOLDS = [1, 8, 0.25]
ENDS = ["largest", "smallest"]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def of_tokens(n: int, channels: int, *, dead: int = 0) -> Tensor:
    x = random(n, channels)
    x[:, channels - dead :] = 0
    return x.T @ x / n


LAYERS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "well_conditioned": lambda out, c: (random(out, c), of_tokens(8 * c, c)),
    "dead_channels": lambda out, c: (random(out, c), of_tokens(8 * c, c, dead=30)),
    "single_token": lambda out, c: (random(out, c), of_tokens(1, c)),
    "low_rank_weight": lambda out, c: (random(out, 3) @ random(3, c), of_tokens(8 * c, c)),
    "zero_weight": lambda out, c: (torch.zeros(out, c, dtype=torch.float64), of_tokens(8 * c, c)),
    "zero_covariance": lambda out, c: (random(out, c), torch.zeros(c, c, dtype=torch.float64)),
}

all_ends = pytest.mark.parametrize("which", ENDS)
all_holds = pytest.mark.parametrize("hold", HOLDS)
all_layers = pytest.mark.parametrize("name", LAYERS)
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])


def layer(
    name: str, shape: tuple[int, int], which: str, rank: int = RANK
) -> tuple[Tensor, Tensor, CoSVD]:
    W, C = LAYERS[name](*shape)
    return W, C, co_svd(W, C, rank=rank, which=which)


def product(factors: AdapterFactors) -> Tensor:
    return factors.scaling * (factors.B @ factors.A)


def halves(factors: AdapterFactors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q, R and S of B = [P, Q], A = [R; S]."""
    P, Q = factors.B.chunk(2, 1)
    R, S = factors.A.chunk(2, 0)
    return P, Q, R, S


def two_sided(
    name: str, shape: tuple[int, int], which: str, rank: int = RANK, power: float = 1.0
) -> tuple[Tensor, CoSVD]:
    W, C = LAYERS[name](*shape)
    D = 1e4 * of_tokens(4 * shape[0], shape[0])
    return W, co_svd(W, C, rank=rank, which=which, power=power, output_covariance=D)


def span(rows: Tensor) -> Tensor:
    """The projection onto what the rows span."""
    Q = torch.linalg.qr(rows.mT).Q
    return Q @ Q.mT


def gradients(factors: AdapterFactors, G: Tensor) -> AdapterFactors:
    """Those of A and B where G is the loss's gradient of W + scaling·B·A."""
    A, B = factors.A.clone().requires_grad_(), factors.B.clone().requires_grad_()
    (factors.scaling * (B @ A)).backward(G)
    assert A.grad is not None
    assert B.grad is not None
    return AdapterFactors(A.grad, B.grad)


@all_shapes
@all_ends
@all_holds
@all_layers
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


@all_shapes
@all_ends
@all_holds
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


@all_shapes
@all_ends
@all_holds
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


@all_shapes
@all_ends
@all_holds
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


@all_shapes
@all_ends
@all_holds
@pytest.mark.parametrize("name", ["well_conditioned", "dead_channels"])
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


@all_shapes
@all_ends
@all_holds
@pytest.mark.parametrize("power", [0.5, 1.0])
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
    with pytest.raises(ConfigError, match="hold must be positive and finite, such as 1 or 8, got"):
        adapter_factors(W, found, hold=hold)
    with pytest.raises(ConfigError, match="hold must be positive and finite, such as 1 or 8, got"):
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


@all_shapes
@all_ends
@all_layers
def test_published_factors_are_finite_and_trainable_and_of_the_projection(
    name: str, which: str, shape: tuple[int, int]
) -> None:
    W, _, found = layer(name, shape, which)
    factors = published_factors(W, found)
    size = 2e-15 * float(W.norm())
    assert float((product(factors) - found.U @ (found.U.T @ W)).norm()) <= size
    assert float((product(factors) + residual(W, factors) - W).norm()) <= size
    assert (factors.A.shape, factors.B.shape) == ((RANK, shape[1]), (shape[0], RANK))
    assert factors.A.dtype == factors.B.dtype == torch.float64
    assert bool(torch.isfinite(factors.A).all() & torch.isfinite(factors.B).all())
    # The gradient of each factor is a product with the other: one of the two must not vanish.
    assert bool(((factors.A != 0).any(1) | (factors.B != 0).any(0)).all())
    assert factors.scaling == 1


@all_shapes
@all_ends
def test_published_factors_are_the_published_formula(which: str, shape: tuple[int, int]) -> None:
    W, C, found = layer("well_conditioned", shape, which)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    kept = slice(RANK) if which == "largest" else slice(-RANK, None)
    root = S[kept].sqrt()
    A = root[:, None] * torch.linalg.solve(C, Vh[kept].T).T
    B = U[:, kept] * root
    factors = published_factors(W, found)
    sign = (factors.B * B).sum(0).sign()
    torch.testing.assert_close(factors.B, B * sign, rtol=0, atol=1e-11 * float(B.norm()))
    torch.testing.assert_close(factors.A, A * sign[:, None], rtol=0, atol=1e-11 * float(A.norm()))
    assert factors.scaling == 1


@all_ends
def test_published_factors_follow_the_units_of_the_covariance(which: str) -> None:
    W, C, found = layer("well_conditioned", SHAPES[0], which)
    published = published_factors(W, found)
    torch.testing.assert_close(published.B.norm(dim=0), found.S.sqrt())
    scaled = published_factors(W, co_svd(W, 100 * C, rank=RANK, which=which))
    torch.testing.assert_close(scaled.B.norm(), 10 * published.B.norm())
    torch.testing.assert_close(scaled.A.norm(), published.A.norm() / 10)


@pytest.mark.parametrize("name", ["dead_channels", "single_token", "zero_covariance"])
def test_published_factors_stay_bounded_where_sigma_vanishes(name: str) -> None:
    W, _, found = layer(name, (64, 40), "smallest")
    strength = (found.U.T @ W).norm(dim=1)
    assert float(strength.min()) > 1e-3
    factors = published_factors(W, found)
    torch.testing.assert_close(factors.B.norm(dim=0), 1e-3 * strength.sqrt())
    torch.testing.assert_close(factors.A.norm(dim=1), 1e3 * strength.sqrt())


def test_published_factors_of_vanishing_components_get_the_median_of_the_live_ones() -> None:
    W, _, found = layer("low_rank_weight", (40, 64), "largest", rank=9)
    factors = published_factors(W, found)
    beta = factors.B.norm(dim=0)
    assert bool((factors.A[:3] != 0).any(1).all())
    assert not bool(factors.A[3:].any())
    torch.testing.assert_close(beta[3:], beta[:3].median().expand(6))


def test_a_weight_of_zero_gets_a_published_b_of_unit_length() -> None:
    W, _, found = layer("zero_weight", (40, 64), "largest")
    factors = published_factors(W, found)
    assert not bool(factors.A.any())
    assert torch.equal(factors.B, found.U)


def test_scaling_the_weight_scales_both_published_factors_alike() -> None:
    W, C, found = layer("well_conditioned", (40, 64), "largest")
    factors = published_factors(W, found)
    tiny = published_factors(1e-6 * W, co_svd(1e-6 * W, C, rank=RANK))
    torch.testing.assert_close(1e6 * product(tiny), product(factors))
    torch.testing.assert_close(1e3 * tiny.A.norm(), factors.A.norm())
    torch.testing.assert_close(1e3 * tiny.B.norm(), factors.B.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_residual_keeps_the_dtype_and_is_rounded_once(dtype: torch.dtype) -> None:
    W, C = LAYERS["well_conditioned"](40, 64)
    W = W.to(dtype).requires_grad_()
    part = published_factors(W, co_svd(W, C, rank=RANK))
    factors = AdapterFactors(3 * part.A, 2 * part.B, 1 / 6)
    rest = residual(W, factors)
    assert rest.dtype == dtype
    assert not any(t.requires_grad for t in (rest, factors.A, factors.B))
    exact = W.detach().double() - product(factors)
    # Half a unit in the last place, and the sum's own rounding in float64.
    error = (rest.double() - exact).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-14).all())


@pytest.mark.parametrize("rank", [1, 40])
@all_ends
def test_ranks_from_one_to_all(which: str, rank: int) -> None:
    W, _, found = layer("well_conditioned", (40, 64), which, rank=rank)
    factors = published_factors(W, found)
    assert float((product(factors) - found.U @ (found.U.T @ W)).norm()) <= 2e-15 * float(W.norm())
    lora = adapter_factors(W, found)
    assert lora.rank == 2 * rank
    torch.testing.assert_close(span(halves(lora)[0].mT), span(found.U.mT))
    if rank == 40:
        assert float(residual(W, factors).norm()) <= 4e-15 * float(W.norm())


@all_shapes
@all_ends
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_published_factors_of_a_two_sided_decomposition_are_its_oblique_projection(
    power: float, which: str, shape: tuple[int, int]
) -> None:
    W, C = LAYERS["well_conditioned"](*shape)
    D = 1e4 * of_tokens(4 * shape[0], shape[0])
    found = co_svd(W, C, rank=RANK, which=which, power=power, output_covariance=D)
    assert found.dual is not None
    expected = found.U @ (found.dual.T @ W)
    factors = published_factors(W, found)
    torch.testing.assert_close(product(factors), expected, rtol=0, atol=1e-13 * float(W.norm()))
    assert float((expected - found.U @ (found.U.T @ W)).norm()) > 0.1 * float(expected.norm())


def test_published_components_that_vanish_two_sidedly_can_still_train() -> None:
    W, C = LAYERS["low_rank_weight"](40, 64)
    found = co_svd(W, C, rank=9, output_covariance=1e6 * of_tokens(160, 40))
    factors = published_factors(W, found)
    assert bool((factors.A[:3] != 0).any(1).all())
    assert not bool(factors.A[3:].any())
    assert bool((factors.B != 0).any(0).all())


@all_shapes
@all_ends
@pytest.mark.parametrize("damping", [None, 0.01])
def test_the_published_reconstruction_is_the_projection_but_for_rounding(
    damping: float | None, which: str, shape: tuple[int, int]
) -> None:
    W, C = LAYERS["well_conditioned"](*shape)
    found = co_svd(W, C, rank=RANK, which=which, damping=damping)
    plain = published_factors(W, found)
    inverse = published_factors(W, found, reconstruction="inverse", covariance=C)
    torch.testing.assert_close(inverse.A, plain.A, rtol=0, atol=1e-11 * float(plain.A.norm()))
    torch.testing.assert_close(inverse.B, plain.B, rtol=0, atol=1e-11 * float(plain.B.norm()))
    assert not torch.equal(inverse.A, plain.A)
    assert inverse.damping == (damping or 0.0)
    assert plain.damping is None


def test_the_published_reconstruction_damps_what_it_cannot_invert() -> None:
    W, C, found = layer("dead_channels", (40, 64), "largest")
    factors = published_factors(W, found, reconstruction="inverse", covariance=C)
    assert factors.damping is not None
    assert 0 < factors.damping < 1e-5
    # What C does not see has no part in Vᵀ.
    expected = found.U @ (found.U.T @ W) * (C.diagonal() > 0)
    error = (product(factors) - expected).norm() / expected.norm()
    assert float(error) <= 1e-4


@all_ends
def test_the_published_reconstruction_keeps_components_that_vanish_trainable(which: str) -> None:
    W, C, found = layer("single_token", (40, 64), which)
    factors = published_factors(W, found, reconstruction="inverse", covariance=C.float())
    assert bool(torch.isfinite(factors.A).all() & torch.isfinite(factors.B).all())
    assert bool(((factors.A != 0).any(1) | (factors.B != 0).any(0)).all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reconstruction": "pinv"}, ConfigError, "reconstruction must be"),
        ({"reconstruction": "inverse"}, ConfigError, "needs the covariance"),
        ({"covariance": torch.eye(64)}, ConfigError, "needs the covariance"),
        (
            {"reconstruction": "inverse", "covariance": torch.eye(3)},
            DecompositionError,
            r"needs a covariance \(64, 64\), got \(3, 3\)",
        ),
        (
            {"reconstruction": "inverse", "covariance": torch.zeros(64, 64)},
            DecompositionError,
            "cannot be inverted.*64 channels are dead",
        ),
    ],
)
def test_a_reconstruction_that_cannot_be_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    W, _, found = layer("well_conditioned", (40, 64), "largest")
    with pytest.raises(error, match=message):
        published_factors(W, found, **options)
