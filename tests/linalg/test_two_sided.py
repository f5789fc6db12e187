"""`co_svd` in norms of both sides, against Eckart and Young in the transformed space."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from pairs import pairwise
from torch import Tensor

from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.linalg import CoSVD, co_svd
from corda_kernels.linalg.context_svd import input_root

RANK = 4
SHAPES = {"wide": (30, 44), "square": (36, 36), "tall": (44, 30)}
ENDS = ["largest", "smallest"]
EPS = torch.finfo(torch.float64).eps


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def of_tokens(n: int, channels: int, *, outlier: float = 1.0, dead: int = 0) -> Tensor:
    x = random(n, channels)
    x[:, 3] *= outlier
    x[:, channels - dead :] = 0
    return x.T @ x / n


def log_spaced(d: int, digits: float) -> Tensor:
    q = torch.linalg.qr(random(d, d)).Q
    c = (q * torch.logspace(0, -digits, d, dtype=torch.float64)) @ q.T
    return (c + c.T) / 2


REGULAR: dict[str, Callable[[int], Tensor]] = {
    "tokens": lambda d: of_tokens(4 * d, d),
    "log_spaced": lambda d: log_spaced(d, 6),
    "outlier_channel": lambda d: of_tokens(4 * d, d, outlier=1e3),
    "identity": lambda d: torch.eye(d, dtype=torch.float64),
}
SINGULAR: dict[str, Callable[[int], Tensor]] = {
    "dead_channels": lambda d: of_tokens(4 * d, d, dead=d // 2),
    "few_tokens": lambda d: of_tokens(d // 3, d),
    "single_token": lambda d: of_tokens(1, d),
    "zero": lambda d: torch.zeros(d, d, dtype=torch.float64),
}

all_ends = pytest.mark.parametrize("which", ENDS)
all_powers = pytest.mark.parametrize("power", [0.5, 1.0])


@cache
def problem(name: str, shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """W, C of the given kind, and D."""
    torch.manual_seed(0)
    out, channels = SHAPES[shape]
    make = (REGULAR | SINGULAR)[name]
    return random(out, channels), make(channels), REGULAR.get(name, REGULAR["tokens"])(out)


def root(c: Tensor, power: float = 0.5) -> Tensor:
    """The symmetric power of C, which is none of the roots that the package takes."""
    eigenvalues, V = torch.linalg.eigh(c)
    return (V * eigenvalues.clamp(min=0) ** power) @ V.T


def part_of(W: Tensor, found: CoSVD) -> Tensor:
    dual = found.U if found.dual is None else found.dual
    return found.U @ (dual.mT @ W)


@pairwise(
    name=list(REGULAR), weighted=[False, True], power=[0.5, 1.0], which=ENDS, shape=list(SHAPES)
)
def test_is_the_optimum_of_eckart_and_young(
    name: str, weighted: bool, power: float, which: str, shape: str
) -> None:
    W, C, D = problem(name, shape)
    found = co_svd(
        W, C, rank=RANK, which=which, power=power, output_covariance=D if weighted else None
    )
    left = root(D) if weighted else torch.eye(len(W), dtype=torch.float64)
    right = root(C, power)
    exact = torch.linalg.svdvals(left @ W @ right)
    kept = slice(RANK) if which == "largest" else slice(-RANK, None)
    torch.testing.assert_close(found.S, exact[kept], rtol=1e-7, atol=1e-13 * float(exact[0]))
    X = part_of(W, found)
    rest = W - X if which == "largest" else X
    least = (exact[RANK:] if which == "largest" else exact[kept]).norm()
    reached = (left @ rest @ right).norm()
    assert float(reached) == pytest.approx(float(least), rel=1e-7, abs=1e-13 * float(exact[0]))
    assert int(torch.linalg.matrix_rank(X)) == RANK


@all_ends
def test_a_root_of_a_large_covariance_is_iterated_with(which: str) -> None:
    # Applied factor by factor, for which a Cholesky factor has to be transposed at times.
    W, C = random(300, 300), log_spaced(300, 6)
    found = co_svd(W, C, rank=RANK, which=which, power=0.5, method="randomized")
    assert float(found.residual) > 0  # the exact method leaves none
    exact = torch.linalg.svdvals(W @ root(C))
    kept = slice(RANK) if which == "largest" else slice(-RANK, None)
    torch.testing.assert_close(found.S, exact[kept], rtol=1e-6, atol=0)


@all_ends
@all_powers
def test_parts_are_oblique_projections_and_both_ends_make_up_the_weight(
    power: float, which: str
) -> None:
    W, C, D = problem("log_spaced", "wide")
    found = co_svd(W, C, rank=RANK, which=which, power=power, output_covariance=D)
    assert found.dual is not None
    eye = torch.eye(RANK, dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ D @ found.U, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.dual.T @ found.U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.dual, D @ found.U, rtol=0, atol=1e-12)
    other = "smallest" if which == "largest" else "largest"
    rest = co_svd(W, C, rank=len(W) - RANK, which=other, power=power, output_covariance=D)
    torch.testing.assert_close(part_of(W, found) + part_of(W, rest), W, rtol=0, atol=1e-9)


def test_no_descent_from_random_or_nearby_starts_does_better() -> None:
    W, C, D = (t[:8, :8].contiguous() for t in problem("tokens", "square"))
    left, right = root(D), root(C)

    def loss(X: Tensor) -> Tensor:
        return (left @ (W - X) @ right).square().sum()

    best = part_of(W, co_svd(W, C, rank=2, power=0.5, output_covariance=D))
    reached = []
    for start in (random(8, 2), random(8, 2), best[:, :2] + 0.1 * random(8, 2)):
        B, A = start.clone().requires_grad_(), random(2, 8).requires_grad_()
        optimizer = torch.optim.LBFGS([B, A], max_iter=500, line_search_fn="strong_wolfe")

        def closure(
            B: Tensor = B, A: Tensor = A, optimizer: torch.optim.LBFGS = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            value = loss(B @ A)
            value.backward()
            return value

        optimizer.step(closure)
        reached.append(float(loss((B @ A).detach())))
    assert min(reached) == pytest.approx(float(loss(best)), rel=1e-6)


def test_power_half_leaves_the_least_error_of_the_outputs() -> None:
    x = random(200, 44) @ random(44, 44)
    W = random(30, 44)
    C = x.T @ x / len(x)
    half, whole = (part_of(W, co_svd(W, C, rank=RANK, power=power)) for power in (0.5, 1.0))
    errors = [float((x @ (W - X).T).square().sum(1).mean()) for X in (half, whole)]
    exact = torch.linalg.svdvals(x @ W.T / len(x) ** 0.5)
    assert errors[0] == pytest.approx(float(exact[RANK:].square().sum()))
    assert errors[1] > 1.01 * errors[0]


@pairwise(name=[*REGULAR, *SINGULAR], which=ENDS, shape=list(SHAPES))
def test_the_defaults_are_co_svd_bit_for_bit(name: str, which: str, shape: str) -> None:
    W, C, _ = problem(name, shape)
    plain = co_svd(W, C, rank=RANK, which=which)
    named = co_svd(W, C, rank=RANK, which=which, output_covariance=None, power=1.0)
    assert torch.equal(plain.U, named.U)
    assert torch.equal(plain.S, named.S)
    assert plain.dual is None
    assert named.dual is None


@all_ends
@all_powers
def test_an_identity_for_output_covariance_changes_nothing(power: float, which: str) -> None:
    W, C, _ = problem("tokens", "wide")
    eye = torch.eye(len(W), dtype=torch.float64)
    plain = co_svd(W, C, rank=RANK, which=which, power=power)
    found = co_svd(W, C, rank=RANK, which=which, power=power, output_covariance=eye)
    torch.testing.assert_close(found.S, plain.S)
    torch.testing.assert_close(found.U.abs(), plain.U.abs())
    torch.testing.assert_close(found.dual, found.U)


@pairwise(name=list(SINGULAR), weighted=[False, True], which=ENDS, shape=list(SHAPES))
def test_of_a_singular_covariance_it_is_the_limit_of_a_vanishing_damping(
    name: str, weighted: bool, which: str, shape: str
) -> None:
    W, C, D = problem(name, shape)
    options: dict[str, Any] = {"rank": RANK, "which": which, "power": 0.5}
    if weighted:
        options["output_covariance"] = D
    limit = part_of(W, co_svd(W, C, **options))
    # Not by `damping`: a mean diagonal of 0 cannot damp.
    eye = torch.eye(len(C), dtype=torch.float64)
    damped = C + 1e-8 * (C.diagonal().mean() if name != "zero" else 1e8) * eye
    expected = part_of(W, co_svd(W, damped, **options))
    assert float((limit - expected).norm() / expected.norm()) <= 1e-5


def test_null_directions_are_zero_and_not_rounding() -> None:
    for name in SINGULAR:
        _, C, _ = problem(name, "wide")
        G = input_root(C)
        torch.testing.assert_close(G @ G.T, C, rtol=0, atol=1e-13 * float(C.norm()))
        rank = int(torch.linalg.matrix_rank(C, hermitian=True))
        assert int((G.norm(dim=0) > 0).sum()) == rank


def test_null_directions_are_zero_also_where_a_cholesky_factor_exists() -> None:
    _, C, _ = problem("few_tokens", "wide")
    level = 0.3 * len(C) * EPS * float(torch.linalg.matrix_norm(C, 2))
    lifted = C + level * torch.eye(len(C), dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(lifted).info) == 0
    rank = int(torch.linalg.matrix_rank(C, hermitian=True))
    assert int((input_root(lifted).norm(dim=0) > 0).sum()) == rank


def test_matrices_of_a_batch_do_not_influence_each_other() -> None:
    names = ["tokens", "few_tokens", "log_spaced", "dead_channels"]
    Ws, Cs, Ds = (torch.stack(t) for t in zip(*(problem(n, "wide") for n in names), strict=True))
    batch = co_svd(Ws, Cs, rank=RANK, power=0.5, output_covariance=Ds)
    assert batch.dual is not None
    assert batch.dual.shape == batch.U.shape == (4, 30, RANK)
    for i in range(4):
        alone = co_svd(Ws[i], Cs[i], rank=RANK, power=0.5, output_covariance=Ds[i])
        torch.testing.assert_close(part_of(Ws, batch)[i], part_of(Ws[i], alone))


def test_a_damping_makes_a_singular_output_covariance_usable() -> None:
    W, C, _ = problem("tokens", "wide")
    D = of_tokens(5, len(W))
    found = co_svd(W, C, rank=RANK, output_covariance=D, damping=0.01)
    shifted = D + 0.01 * D.diagonal().mean() * torch.eye(len(D), dtype=torch.float64)
    eye = torch.eye(RANK, dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ shifted @ found.U, eye, rtol=0, atol=1e-12)


def test_inputs_are_left_alone_and_may_be_of_any_dtype() -> None:
    W, C, D = (t.float().requires_grad_() for t in problem("tokens", "wide"))
    before = [t.detach().clone() for t in (W, C, D)]
    found = co_svd(W, C, rank=RANK, power=0.5, output_covariance=D, damping=0.01)
    assert found.U.dtype == torch.float64
    assert not found.U.requires_grad
    assert all(torch.equal(t, old) for t, old in zip((W, C, D), before, strict=True))


def test_what_float32_leaves_below_zero_is_forgiven_and_no_more() -> None:
    W, C, _ = problem("few_tokens", "wide")
    single = C.float()
    assert float(torch.linalg.eigvalsh(single.double())[0]) < 0
    found = part_of(W, co_svd(W, single, rank=RANK, power=0.5))
    expected = part_of(W, co_svd(W, C, rank=RANK, power=0.5))
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    eye = torch.eye(len(C), dtype=torch.float64)
    with pytest.raises(DecompositionError, match=r"44 channels.*eigenvalue of -.*not a covariance"):
        co_svd(W, C - 0.01 * eye, rank=RANK, power=0.5)


BAD_OUTPUTS: dict[str, tuple[Callable[[int], Tensor], str]] = {
    "few_tokens": (lambda d: of_tokens(5, d), "singular or indefinite.*use a damping"),
    "dead": (lambda d: of_tokens(90, d, dead=3), "singular or indefinite.*use a damping"),
    "zero": (lambda d: torch.zeros(d, d), "singular or indefinite"),
    "indefinite": (lambda d: -torch.eye(d), "singular or indefinite"),
    "nan": (lambda d: torch.full((d, d), torch.nan), "NaN or Inf"),
    "inf": (lambda d: torch.eye(d).index_fill(0, torch.tensor([7]), torch.inf), "NaN or Inf"),
    "shape": (lambda d: torch.eye(d + 1), r"needs an output covariance \(\*batch, out, out\)"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_an_output_covariance_that_cannot_be_used_is_refused(name: str) -> None:
    W, C, _ = problem("tokens", "wide")
    make, message = BAD_OUTPUTS[name]
    with pytest.raises(DecompositionError, match=message):
        co_svd(W, C, rank=RANK, output_covariance=make(len(W)))


@pytest.mark.parametrize("power", [0.0, 0.25, -1.0, 2.0, float("nan")])
def test_other_powers_are_refused(power: float) -> None:
    W, C, _ = problem("tokens", "wide")
    with pytest.raises(ConfigError, match=r"power must be 0\.5 or 1\.0"):
        co_svd(W, C, rank=RANK, power=power)
