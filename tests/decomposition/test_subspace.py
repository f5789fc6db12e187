from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from corda_kernels.decomposition.subspace import bottom_subspace, top_subspace

EPS = torch.finfo(torch.float64).eps


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(random(rows, columns)).Q


def known(rows: int, columns: int, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """M (rows, columns) with singular values sigma, and its left singular vectors."""
    U, V = orthonormal(rows, len(sigma)), orthonormal(columns, len(sigma))
    return (U * sigma) @ V.T, U


def log_spaced(n: int, digits: float) -> Tensor:
    return torch.logspace(0, -digits, n, dtype=torch.float64)


def steps(n: int, rank: int, levels: tuple[float, float, float]) -> Tensor:
    """Three flat levels: `rank` values, those between, and `rank` values again."""
    counts = torch.tensor([rank, n - 2 * rank, rank])
    return torch.tensor(levels, dtype=torch.float64).repeat_interleave(counts)


def triangle(M: Tensor) -> Tensor:
    return torch.linalg.qr(M.mT, mode="r").R.mT


def top(M: Tensor, rank: int, *, block: int = 20, tolerance: float = 1e-8) -> tuple[Tensor, ...]:
    start = random(*M.shape[:-2], M.shape[-1], block)
    return top_subspace(lambda X: M @ X, lambda Y: M.mT @ Y, start, rank, tolerance=tolerance)


def bottom(L: Tensor, rank: int, *, block: int = 36, tolerance: float = 1e-4) -> tuple[Tensor, ...]:
    return bottom_subspace(L, random(*L.shape[:-1], block), rank, tolerance=tolerance)


def distance(U: Tensor, V: Tensor) -> float:
    """Sine of the largest angle between the spans of orthonormal U and V."""
    return float(torch.linalg.matrix_norm(U - V @ (V.mT @ U), 2))


def ritz_residual(M: Tensor, U: Tensor, S: Tensor) -> float:
    return float(((M @ (M.T @ U) - U * S.square()).norm(dim=0) / S.square()).max())


TOP_SPECTRA: dict[str, Tensor] = {
    "log_spaced": log_spaced(200, 12),
    "one_outlier": torch.cat([torch.tensor([1e3]).double(), log_spaced(199, 6)]),
    # Their Krylov spaces run out in the middle of a block.
    "steps": steps(200, 4, (1, 1e-2, 1e-6)),
    "rank_22": log_spaced(22, 1),
    "rank_30": log_spaced(30, 1),
    "rank_65": log_spaced(65, 2),
}


@pytest.mark.parametrize("columns", [200, 260])
@pytest.mark.parametrize("name", TOP_SPECTRA)
def test_top_finds_the_known_vectors(name: str, columns: int) -> None:
    sigma = TOP_SPECTRA[name]
    M, known_U = known(200, columns, sigma)
    U, S, residual = top(M, 4)
    assert float(residual) <= 1e-8
    # An angle is at most the residual over the gap of σ², of which 1e-8 is relative to σ².
    squared = sigma.square()
    gap = float((squared[3] - squared[4]) / squared[0])
    assert distance(U, known_U[:, :4]) <= 1e-8 / gap
    assert float(residual) == pytest.approx(ritz_residual(M, U, S), rel=1e-3, abs=1e-11)
    torch.testing.assert_close(S, sigma[:4], rtol=1e-12, atol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


def test_top_reports_the_true_residual_of_what_it_returns() -> None:
    for sigma, tolerance in ((log_spaced(200, 12), 0.1), (torch.linspace(1, 0, 200).double(), 0)):
        M, _ = known(200, 240, sigma)
        U, S, residual = top(M, 4, tolerance=tolerance)
        assert float(residual) == pytest.approx(ritz_residual(M, U, S), rel=1e-3)
        assert tolerance == 0 or float(residual) <= tolerance


def test_top_stops_at_the_tolerance_and_not_before() -> None:
    M, _ = known(400, 400, log_spaced(400, 6))
    calls = []
    for tolerance in (1e-1, 1e-4, 1e-8):
        products: list[int] = []

        def multiply(X: Tensor, products: list[int] = products) -> Tensor:
            products.append(X.shape[1])
            return M @ X

        top_subspace(multiply, lambda Y: M.T @ Y, random(400, 12), 4, tolerance=tolerance)
        calls.append(len(products))
    assert calls == sorted(set(calls))


@pytest.mark.parametrize(("n", "block"), [(30, 20), (60, 20), (600, 8)])
def test_top_gives_up_with_an_honest_residual(n: int, block: int) -> None:
    # A flat spectrum: the basis reaches half of the space, or 12 blocks, before it converges.
    M = random(n, n)
    U, S, residual = top(M, 4, block=block)
    assert float(residual) > 1e-8
    assert float(residual) == pytest.approx(ritz_residual(M, U, S), rel=1e-6)
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


def test_top_keeps_its_basis_orthonormal_in_an_exhausted_space() -> None:
    M, known_U = known(200, 200, torch.tensor([3.0, 2.0, 1.0]).double())
    U, S, residual = top(M, 3)
    assert float(residual) <= 1e-12
    assert distance(U, known_U) <= 1e-13
    torch.testing.assert_close(S, torch.tensor([3.0, 2.0, 1.0]).double())


BOTTOM_SPECTRA: dict[str, Tensor] = {
    "log_spaced_to_1e-4": log_spaced(120, 4),
    "log_spaced_to_1e-12": log_spaced(120, 12),
    "steps": steps(120, 4, (1, 1e-3, 1e-6)),
    "two_clusters": steps(120, 60, (1, 1, 1e-6)) * torch.linspace(1, 0.5, 120),
    "flat": torch.linspace(1.01, 1, 120).double(),
    "one_outlier": torch.cat([torch.tensor([1e9]).double(), torch.linspace(1, 0.5, 119).double()]),
}


@pytest.mark.parametrize("columns", [120, 200])
@pytest.mark.parametrize("name", BOTTOM_SPECTRA)
def test_bottom_holds_the_least_energy(name: str, columns: int) -> None:
    sigma = BOTTOM_SPECTRA[name]
    M, _ = known(120, columns, sigma)
    U, S, fall = bottom(triangle(M), 4)
    best = float(sigma[-4:].norm())
    rounding = 120 * EPS * float(sigma[0])
    # The energy falls by 1e-4 at most in the last step; measured 0.4 % above the least.
    assert float((U.T @ M).norm()) <= 1.005 * best + rounding
    torch.testing.assert_close(S, sigma[-4:], rtol=0.01, atol=rounding)
    assert float(fall) <= 1e-4
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("digits", [4, 8, 12])
def test_bottom_does_not_square_the_condition(digits: int) -> None:
    sigma = steps(120, 4, (1, 10.0 ** (2 - digits), 10.0**-digits))
    M, known_U = known(120, 120, sigma)
    U, _, _ = bottom(triangle(M), 4)
    # M itself holds its smallest vectors to eps·σ₁ over the gap; a squared condition would be 1.
    assert distance(U, known_U[:, -4:]) <= 120 * EPS * 10.0**digits + 1e-10


def test_bottom_reports_the_last_fall_where_twelve_steps_do_not_do() -> None:
    L = triangle(random(300, 300) + 30 * orthonormal(300, 300))
    _, _, fall = bottom(L, 4, block=6, tolerance=1e-12)
    assert float(fall) > 1e-12
    assert torch.isfinite(fall)


SINGULAR: dict[str, Callable[[], Tensor]] = {
    "rank_10": lambda: triangle(random(60, 10) @ random(10, 60)),
    "one_zero_row": lambda: triangle(random(60, 60) * (torch.arange(60) != 7)[:, None]),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_bottom_of_a_singular_triangle_is_finite_and_null(name: str) -> None:
    L = SINGULAR[name]()
    U, S, _ = bottom(L, 1)
    assert bool(torch.isfinite(U).all())
    assert bool(torch.isfinite(S).all())
    assert float((U.T @ L).norm()) <= 60 * EPS * float(torch.linalg.matrix_norm(L))


@pytest.mark.parametrize("method", [top, lambda M, rank: bottom(triangle(M), rank)])
def test_a_batch_equals_one_by_one(method: Callable[..., tuple[Tensor, ...]]) -> None:
    spectra = [log_spaced(160, digits) for digits in (3, 6, 10)]
    M = torch.stack([known(160, 160, sigma)[0] for sigma in spectra] * 2).reshape(2, 3, 160, 160)
    U, S, stopped = method(M, 4)
    assert (U.shape, S.shape, stopped.shape) == ((2, 3, 160, 4), (2, 3, 4), (2, 3))
    for index in range(6):
        one_U, one_S, _ = method(M.reshape(6, 160, 160)[index], 4)
        together = U.reshape(6, 160, 4)[index]
        torch.testing.assert_close(S.reshape(6, 4)[index], one_S, rtol=1e-3, atol=0)
        # Angles of the bottom are as good as its tolerance on the energy, 1e-4.
        assert distance(together, one_U) <= 0.05
