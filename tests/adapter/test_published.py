"""The published form: A, B and the residual."""

from __future__ import annotations

import pytest
import torch
from factor_cases import (
    ENDS,
    LAYERS,
    RANK,
    SHAPES,
    all_ends,
    halves,
    layer,
    of_tokens,
    product,
    span,
)
from pairs import pairwise

from corda_kernels.adapter.factors import AdapterFactors, adapter_factors
from corda_kernels.adapter.published import published_factors, residual
from corda_kernels.linalg import co_svd


@pairwise(shape=SHAPES, which=ENDS, name=list(LAYERS))
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


@pairwise(shape=SHAPES, which=ENDS)
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


@pairwise(shape=SHAPES, which=ENDS, power=[0.5, 1.0])
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
