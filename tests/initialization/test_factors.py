from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from corda_kernels.decomposition import CoSVD, co_svd
from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.initialization.factors import AdapterFactors, adapter_factors, residual

RANK = 6
SHAPES = [(40, 64), (48, 48), (64, 40)]
BALANCES = ["even", "paper"]
STEPS = [None, "lora"]
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
all_balances = pytest.mark.parametrize("balance", BALANCES)
all_steps = pytest.mark.parametrize("step", STEPS)
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square", "tall"])


def layer(
    name: str, shape: tuple[int, int], which: str, rank: int = RANK
) -> tuple[Tensor, Tensor, CoSVD]:
    W, C = LAYERS[name](*shape)
    return W, C, co_svd(W, C, rank=rank, which=which)


def product(factors: AdapterFactors) -> Tensor:
    return factors.scaling * (factors.B @ factors.A)


@all_shapes
@all_ends
@all_balances
@all_steps
@pytest.mark.parametrize("name", LAYERS)
def test_any_layer_gets_finite_trainable_factors_of_its_projection(
    name: str, step: Any, balance: Any, which: str, shape: tuple[int, int]
) -> None:
    W, _, found = layer(name, shape, which)
    factors = adapter_factors(W, found, balance=balance, step=step)
    size = 2e-15 * float(W.norm())
    assert float((product(factors) - found.U @ (found.U.T @ W)).norm()) <= size
    assert float((product(factors) + residual(W, factors) - W).norm()) <= size
    assert (factors.A.shape, factors.B.shape) == ((RANK, shape[1]), (shape[0], RANK))
    assert factors.A.dtype == factors.B.dtype == torch.float64
    assert bool(torch.isfinite(factors.A).all() & torch.isfinite(factors.B).all())
    # The gradient of each factor is a product with the other: one of the two must not vanish.
    assert bool(((factors.A != 0).any(1) | (factors.B != 0).any(0)).all())
    assert 0 < factors.scaling < torch.inf


@all_shapes
@all_ends
def test_paper_factors_are_the_published_formula(which: str, shape: tuple[int, int]) -> None:
    W, C, found = layer("well_conditioned", shape, which)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    kept = slice(RANK) if which == "largest" else slice(-RANK, None)
    root = S[kept].sqrt()
    A = root[:, None] * torch.linalg.solve(C, Vh[kept].T).T
    B = U[:, kept] * root
    factors = adapter_factors(W, found, balance="paper")
    sign = (factors.B * B).sum(0).sign()
    torch.testing.assert_close(factors.B, B * sign, rtol=0, atol=1e-11 * float(B.norm()))
    torch.testing.assert_close(factors.A, A * sign[:, None], rtol=0, atol=1e-11 * float(A.norm()))
    assert factors.scaling == 1


@all_shapes
@all_ends
def test_even_factors_have_one_rms_whatever_the_units_of_the_covariance(
    which: str, shape: tuple[int, int]
) -> None:
    W, C, found = layer("well_conditioned", shape, which)
    even = adapter_factors(W, found)
    torch.testing.assert_close(even.A.square().mean(1), even.B.square().mean(0))
    scaled = adapter_factors(W, co_svd(W, 100 * C, rank=RANK, which=which), balance="even")
    sign = (even.B * scaled.B).sum(0).sign()
    torch.testing.assert_close(scaled.A * sign[:, None], even.A)
    torch.testing.assert_close(scaled.B * sign, even.B)


@all_ends
def test_paper_factors_follow_the_units_of_the_covariance(which: str) -> None:
    W, C, found = layer("well_conditioned", SHAPES[0], which)
    paper = adapter_factors(W, found, balance="paper")
    torch.testing.assert_close(paper.B.norm(dim=0), found.S.sqrt())
    scaled = adapter_factors(W, co_svd(W, 100 * C, rank=RANK, which=which), balance="paper")
    torch.testing.assert_close(scaled.B.norm(), 10 * paper.B.norm())
    torch.testing.assert_close(scaled.A.norm(), paper.A.norm() / 10)


@pytest.mark.parametrize("name", ["dead_channels", "single_token", "zero_covariance"])
def test_paper_factors_stay_bounded_where_sigma_vanishes(name: str) -> None:
    W, _, found = layer(name, (64, 40), "smallest")
    strength = (found.U.T @ W).norm(dim=1)
    assert float(strength.min()) > 1e-3
    factors = adapter_factors(W, found, balance="paper")
    torch.testing.assert_close(factors.B.norm(dim=0), 1e-3 * strength.sqrt())
    torch.testing.assert_close(factors.A.norm(dim=1), 1e3 * strength.sqrt())


@all_balances
def test_vanishing_components_get_the_median_of_the_live_ones(balance: Any) -> None:
    W, _, found = layer("low_rank_weight", (40, 64), "largest", rank=9)
    factors = adapter_factors(W, found, balance=balance)
    beta = factors.B.norm(dim=0)
    assert bool((factors.A[:3] != 0).any(1).all())
    assert not bool(factors.A[3:].any())
    torch.testing.assert_close(beta[3:], beta[:3].median().expand(6))


@all_balances
def test_a_weight_of_zero_gets_a_unit_b(balance: Any) -> None:
    W, _, found = layer("zero_weight", (40, 64), "largest")
    factors = adapter_factors(W, found, balance=balance)
    assert not bool(factors.A.any())
    assert torch.equal(factors.B, found.U)


def signs_of(like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape, dtype=torch.float64) * 2 - 1


def first_step_of_adam(factors: AdapterFactors, rate: float = 1e-7) -> float:
    """‖ΔW‖ over the rate when every entry of A and of B moves by it, either way."""
    A = factors.A + rate * signs_of(factors.A)
    B = factors.B + rate * signs_of(factors.B)
    return float((factors.scaling * (B @ A) - product(factors)).norm()) / rate


@all_shapes
@all_ends
@all_balances
@pytest.mark.parametrize("name", ["well_conditioned", "dead_channels", "low_rank_weight"])
def test_the_step_of_lora_moves_the_weight_as_much_as_plain_lora(
    name: str, balance: Any, which: str, shape: tuple[int, int]
) -> None:
    out, channels = shape
    W, _, found = layer(name, shape, which)
    factors = adapter_factors(W, found, balance=balance, step="lora")
    steps = [first_step_of_adam(factors) for _ in range(40)]
    expected = (out * RANK / 3) ** 0.5
    assert sum(steps) / 40 == pytest.approx(expected, rel=0.03)

    plain = torch.nn.init.kaiming_uniform_(torch.empty(RANK, channels).double(), a=5**0.5)
    lora = AdapterFactors(plain, torch.zeros(out, RANK, dtype=torch.float64))
    steps = [first_step_of_adam(lora) for _ in range(40)]
    assert sum(steps) / 40 == pytest.approx(expected, rel=0.1)


@all_balances
def test_the_step_changes_the_size_of_the_factors_and_not_their_ratio(balance: Any) -> None:
    W, _, found = layer("well_conditioned", (40, 64), "smallest")
    plain = adapter_factors(W, found, balance=balance)
    scaled = adapter_factors(W, found, balance=balance, step="lora")
    root = scaled.scaling**0.5
    assert scaled.scaling != pytest.approx(1, rel=0.1)
    torch.testing.assert_close(root * scaled.A, plain.A)
    torch.testing.assert_close(root * scaled.B, plain.B)


@all_balances
def test_scaling_the_weight_scales_both_factors_alike(balance: Any) -> None:
    W, C, found = layer("well_conditioned", (40, 64), "largest")
    factors = adapter_factors(W, found, balance=balance)
    tiny = adapter_factors(1e-6 * W, co_svd(1e-6 * W, C, rank=RANK), balance=balance)
    torch.testing.assert_close(1e6 * product(tiny), product(factors))
    torch.testing.assert_close(1e3 * tiny.A.norm(), factors.A.norm())
    torch.testing.assert_close(1e3 * tiny.B.norm(), factors.B.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_residual_keeps_the_dtype_and_is_rounded_once(dtype: torch.dtype) -> None:
    W, C = LAYERS["well_conditioned"](40, 64)
    W = W.to(dtype).requires_grad_()
    factors = adapter_factors(W, co_svd(W, C, rank=RANK), step="lora")
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
    factors = adapter_factors(W, found)
    assert float((product(factors) - found.U @ (found.U.T @ W)).norm()) <= 2e-15 * float(W.norm())
    if rank == 40:
        assert float(residual(W, factors).norm()) <= 4e-15 * float(W.norm())


@pytest.mark.parametrize("options", [{"balance": "odd"}, {"step": "adam"}, {"balance": None}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    W, _, found = layer("well_conditioned", (40, 64), "largest")
    with pytest.raises(ConfigError, match='balance must be "even" or "paper" and step None or'):
        adapter_factors(W, found, **options)


@all_shapes
@all_ends
@all_balances
@all_steps
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_factors_of_a_two_sided_decomposition_are_its_oblique_projection(
    power: float, step: Any, balance: Any, which: str, shape: tuple[int, int]
) -> None:
    W, C = LAYERS["well_conditioned"](*shape)
    D = 1e4 * of_tokens(4 * shape[0], shape[0])
    found = co_svd(W, C, rank=RANK, which=which, power=power, output_covariance=D)
    assert found.dual is not None
    expected = found.U @ (found.dual.T @ W)
    factors = adapter_factors(W, found, balance=balance, step=step)
    torch.testing.assert_close(product(factors), expected, rtol=0, atol=1e-13 * float(W.norm()))
    assert float((expected - found.U @ (found.U.T @ W)).norm()) > 0.1 * float(expected.norm())
    if balance == "even":
        torch.testing.assert_close(factors.A.square().mean(1), factors.B.square().mean(0))


def test_vanishing_components_of_a_two_sided_decomposition_can_still_train() -> None:
    W, C = LAYERS["low_rank_weight"](40, 64)
    found = co_svd(W, C, rank=9, output_covariance=1e6 * of_tokens(160, 40))
    factors = adapter_factors(W, found)
    assert bool((factors.A[:3] != 0).any(1).all())
    assert not bool(factors.A[3:].any())
    assert bool((factors.B != 0).any(0).all())


@all_shapes
@all_ends
@all_balances
@pytest.mark.parametrize("damping", [None, 0.01])
def test_the_published_reconstruction_is_the_projection_but_for_rounding(
    damping: float | None, balance: Any, which: str, shape: tuple[int, int]
) -> None:
    W, C = LAYERS["well_conditioned"](*shape)
    found = co_svd(W, C, rank=RANK, which=which, damping=damping)
    plain = adapter_factors(W, found, balance=balance)
    inverse = adapter_factors(W, found, balance=balance, reconstruction="inverse", covariance=C)
    torch.testing.assert_close(inverse.A, plain.A, rtol=0, atol=1e-11 * float(plain.A.norm()))
    torch.testing.assert_close(inverse.B, plain.B, rtol=0, atol=1e-11 * float(plain.B.norm()))
    assert not torch.equal(inverse.A, plain.A)
    assert inverse.damping == (damping or 0.0)
    assert plain.damping is None


@all_steps
def test_the_published_reconstruction_damps_what_it_cannot_invert(step: Any) -> None:
    W, C, found = layer("dead_channels", (40, 64), "largest")
    factors = adapter_factors(W, found, step=step, reconstruction="inverse", covariance=C)
    assert factors.damping is not None
    assert 0 < factors.damping < 1e-5
    # What C does not see has no part in Vᵀ.
    expected = found.U @ (found.U.T @ W) * (C.diagonal() > 0)
    error = (product(factors) - expected).norm() / expected.norm()
    assert float(error) <= 1e-4


@all_ends
def test_the_published_reconstruction_keeps_components_that_vanish_trainable(which: str) -> None:
    W, C, found = layer("single_token", (40, 64), which)
    factors = adapter_factors(W, found, reconstruction="inverse", covariance=C.float())
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
        adapter_factors(W, found, **options)
