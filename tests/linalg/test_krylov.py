from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from corda_kernels.linalg import krylov
from corda_kernels.linalg.exact import lower_triangle
from corda_kernels.linalg.krylov import Stop, leading_pairs
from corda_kernels.linalg.solves import Operators, inverse_of_factors, inverse_of_product

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


def top(
    M: Tensor, rank: int, *, block: int = 20, tolerance: float = 1e-4, least_gap: float = 1e-3
) -> tuple[Tensor, ...]:
    start = random(*M.shape[:-2], M.shape[-1], block)
    operators = (lambda X: M.mT @ X, lambda Y: M @ Y)
    return leading_pairs(operators, start, rank, Stop(tolerance, least_gap, 1e2))


def bottom(M: Tensor, rank: int, *, block: int = 20, tolerance: float = 1e-2) -> tuple[Tensor, ...]:
    L = lower_triangle(M)
    operators = (
        lambda X: torch.linalg.solve_triangular(L, X, upper=False),
        lambda Y: torch.linalg.solve_triangular(L.mT, Y, upper=True),
    )
    start = random(*L.shape[:-1], block)
    U, S, error = leading_pairs(operators, start, rank, Stop(tolerance, 1e-2, 1e2))
    return U.flip(-1), 1 / S.flip(-1), error


def distance(U: Tensor, V: Tensor) -> float:
    """Sine of the largest angle between the spans of orthonormal U and V."""
    return float(torch.linalg.matrix_norm(U - V @ (V.mT @ U), 2))


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
    U, S, error = top(M, 4)
    assert float(error) <= 1e-4
    assert distance(U, known_U[:, :4]) <= 1e-6
    torch.testing.assert_close(S, sigma[:4], rtol=1e-9, atol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("digits", [0, 4, 6, 7, 8, 12])
def test_columns_become_orthonormal_however_close_they_are(digits: int, dtype: torch.dtype) -> None:
    columns, _ = known(120, 8, log_spaced(8, digits))
    columns = columns.to(dtype)
    Q = krylov._orthonormal(columns)
    assert Q.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(Q.T @ Q, torch.eye(8, dtype=dtype), rtol=0, atol=20 * eps)
    # Each lies in the span as far as its own rounding allows.
    left = columns - Q @ (Q.T @ columns)
    assert float(left.norm()) <= 50 * eps


def test_only_columns_that_nearly_coincide_take_a_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda X: taken.append(X) or qr(X))
    free = random(2, 50, 6) * torch.logspace(0, 9, 6).double()
    krylov._orthonormal(free)
    assert not taken
    close = free.clone()
    close[1, :, 3] = close[1, :, 2] * (1 + 1e-9 * random(50))
    Q = krylov._orthonormal(close)
    assert len(taken) == 1
    eye = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    torch.testing.assert_close(Q.mT @ Q, eye, rtol=0, atol=1e-14)
    zero = krylov._orthonormal(torch.zeros(50, 6, dtype=torch.float64))
    torch.testing.assert_close(zero.T @ zero, eye[0], rtol=0, atol=1e-14)


def test_a_smaller_tolerance_takes_more_work_and_leaves_less_error() -> None:
    M, known_U = known(400, 400, torch.linspace(1, 0, 400).double() ** 3)
    work, errors = [], []
    for tolerance in (1, 1e-3, 1e-9):
        columns: list[int] = []

        def half(X: Tensor, columns: list[int] = columns) -> Tensor:
            columns.append(X.shape[1])
            return M.T @ X

        torch.manual_seed(1)
        operators, stop = (half, lambda Y: M @ Y), Stop(tolerance, 1e-3, 1e2)
        U, _, error = leading_pairs(operators, random(400, 12), 4, stop)
        assert float(error) <= tolerance
        assert distance(U, known_U[:, :4]) <= tolerance
        work.append(sum(columns))
        errors.append(distance(U, known_U[:, :4]))
    assert work == sorted(set(work))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("n", "block"), [(30, 10), (600, 5)])
def test_it_gives_up_with_an_honest_error(n: int, block: int) -> None:
    M = orthonormal(n, n) * torch.linspace(1, 0.99, n)
    U, _, error = top(M, 4, block=block, tolerance=1e-12, least_gap=1e-9)
    assert float(error) > 1e-12
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_slow_spectrum_behind_one_outlier_converges_over_several_starts() -> None:
    # As in the layer of massive activations: what one application gains has to be learnt.
    sigma = torch.cat([torch.tensor([1e5]), torch.linspace(1, 0.5, 299)]).double()
    M, known_U = known(300, 300, sigma)
    U, _, error = top(M, 16, block=32, tolerance=1e-3)
    assert float(error) <= 1e-3
    assert distance(U, known_U[:, :16]) <= 1e-2


def test_the_basis_stays_orthonormal_in_an_exhausted_space() -> None:
    M, known_U = known(200, 200, torch.tensor([3.0, 2.0, 1.0]).double())
    U, S, error = top(M, 3)
    assert float(error) <= 1e-12
    assert distance(U, known_U) <= 1e-13
    torch.testing.assert_close(S, torch.tensor([3.0, 2.0, 1.0]).double())


@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-3])
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_the_estimated_error_is_the_true_one_within_an_order_of_magnitude(
    size: float, gap: float
) -> None:
    torch.manual_seed(0)
    n, rank, block = 300, 8, 24
    sigma = torch.cat([torch.linspace(2, 1, rank), (1 - gap) * torch.linspace(1, 0, n - rank) ** 2])
    M, known_U = known(n, n, sigma.double())
    A = M @ M.T
    Q = torch.linalg.qr(known_U[:, :block] + size * random(n, block) / n**0.5).Q
    theta, turn = (part.flip(-1) for part in torch.linalg.eigh(Q.T @ A @ Q))
    ritz = Q @ turn
    estimated = float(krylov._error(ritz, A @ ritz, theta, rank, 1e-3))
    true = float(
        (ritz - known_U[:, :rank] @ (known_U[:, :rank].T @ ritz))[:, :rank].norm(dim=0).max()
    )
    assert true / 3 <= estimated <= 30 * true


@pytest.mark.parametrize("gap", [1e-1, 1e-3])
def test_the_estimated_error_counts_what_residuals_do_to_a_close_neighbour(gap: float) -> None:
    A = torch.tensor([[1, 0, 0.01], [0, 1 - gap, 0.01], [0.01, 0.01, 0]], dtype=torch.float64)
    ritz = torch.eye(3, 2, dtype=torch.float64)
    estimated = float(krylov._error(ritz, A @ ritz, A.diagonal(), 1, 1e-4))
    sine = float((1 - torch.linalg.eigh(A).eigenvectors[0, -1] ** 2).sqrt())
    assert estimated == pytest.approx(sine, rel=0.2)


def test_a_small_gap_behind_the_wanted_ones_does_not_ask_for_more_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Told apart from its neighbour within the block, not by more of them.
    monkeypatch.setattr(krylov, "_FIRST_LOOK", (4, 2))
    sigma = log_spaced(400, 6)
    sigma[4] = sigma[3] * (1 - 1e-3)
    M, known_U = known(400, 400, sigma)
    columns: list[int] = []

    def half(X: Tensor) -> Tensor:
        columns.append(X.shape[1])
        return M.T @ X

    torch.manual_seed(1)
    stop = Stop(1e-4, 1e-3, 1e2)
    U, _, error = leading_pairs((half, lambda Y: M @ Y), random(400, 20), 4, stop)
    assert float(error) <= 1e-4
    assert distance(U, known_U[:, :4]) <= 1e-4
    assert sum(columns) <= 5 * 20  # 4 blocks, and once more


def counted(M: Tensor, columns: list[int]) -> Operators:
    def half(X: Tensor) -> Tensor:
        columns.append(X.shape[1])
        return M.mT @ X

    return half, lambda Y: M @ Y


# Of the first, float32 finds all but the last digits; of the second, a part; of the third, nothing.
@pytest.mark.parametrize(("outlier", "most"), [(1.0, 2), (3e3, 9), (1e9, 40)])
def test_a_draft_in_float32_is_corrected_in_float64(outlier: float, most: int) -> None:
    torch.manual_seed(1)
    sigma = torch.linspace(1, 0, 400).double() ** 6
    sigma[0] = outlier
    M, known_U = known(400, 400, sigma)
    double: list[int] = []
    single: list[int] = []
    stop = Stop(1e-4, 1e-3, 1e1)
    draft = counted(M.float(), single)
    U, S, error = leading_pairs(counted(M, double), random(400, 24), 8, stop, draft=draft)
    assert U.dtype == S.dtype == error.dtype == torch.float64
    assert float(error) <= 1e-4
    assert distance(U, known_U[:, :8]) <= 1e-4
    torch.testing.assert_close(S, sigma[:8], rtol=1e-7, atol=0)
    assert single
    assert sum(double) <= most * 24


def test_a_flat_spectrum_is_left_to_float32_until_it_is_measured() -> None:
    torch.manual_seed(1)
    M = random(600, 600)
    double: list[int] = []
    single: list[int] = []
    stop = Stop(2e-5, 1e-3, 3e1)
    draft = counted(M.float(), single)
    U, _, error = leading_pairs(counted(M, double), random(600, 32), 8, stop, draft=draft)
    assert float(error) <= 2e-5
    assert distance(U, torch.linalg.svd(M).U[:, :8]) <= 2e-5
    assert len(double) <= 2
    assert len(single) <= 20


@pytest.mark.parametrize(("first", "last"), [((5.0, 6.0), 1e-4), ((0.5, 0.6), 0.6)])
def test_only_an_error_that_means_something_shows_where_float32_ends(
    first: tuple[float, ...], last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([*first, 1e-4])
    monkeypatch.setattr(krylov, "_error", lambda *_: torch.tensor(next(errors)))
    front = krylov._orthonormal(random(400, 12).float())
    operators = counted(random(400, 400).float(), [])
    _, error = krylov._bidiagonalized(operators, front, 4, 0, 1e-3, 1e-3)
    assert error == pytest.approx(last)


@pytest.mark.parametrize("drafted", [False, True])
def test_the_far_side_has_the_other_vectors(drafted: bool) -> None:
    torch.manual_seed(1)
    M, known_U = known(150, 400, log_spaced(150, 4))
    V = torch.linalg.svd(M, full_matrices=False)[2].T
    draft = (lambda X: M.float().T @ X, lambda Y: M.float() @ Y) if drafted else None
    stop = Stop(1e-5, 1e-3, 1e2)
    start = random(400, 20)
    for far, expected in ((False, known_U), (True, V)):
        found, S, error = leading_pairs(counted(M, []), start, 4, stop, far=far, draft=draft)
        assert float(error) <= 1e-5
        assert distance(found, expected[:, :4]) <= 1e-5
        torch.testing.assert_close(S, log_spaced(150, 4)[:4], rtol=1e-9, atol=0)


# Of float32 the first range is too small in the start, the second in the iteration.
@pytest.mark.parametrize("size", [1e300, 1e30])
def test_a_draft_that_overflows_is_thrown_away(size: float) -> None:
    M, known_U = known(300, 300, log_spaced(300, 6))
    large = (lambda X: (size * (M.T @ X)).float(), lambda Y: (size * (M @ Y)).float())
    draft = (lambda X: large[0](X.double()), lambda Y: large[1](Y.double()))
    stop = Stop(1e-4, 1e-3, 1e2)
    U, _, error = leading_pairs(counted(M, []), random(300, 20), 4, stop, draft=draft)
    assert float(error) <= 1e-4
    assert distance(U, known_U[:, :4]) <= 1e-5


def test_small_values_are_found_in_float32_as_far_as_their_own_ratio_allows() -> None:
    # On A alone rounding would hide what lies below √eps = 3e-4 of the largest.
    torch.manual_seed(1)
    sigma = torch.cat([torch.ones(1), torch.logspace(-3, -5, 299)]).double()
    M, known_U = known(300, 300, sigma)
    operators = counted(M.float(), [])
    front = krylov._orthonormal(operators[1](random(300, 24).float()))
    found, error = krylov._bidiagonalized(operators, front, 8, 0, 1e-3, 1e-3)
    assert found.dtype == torch.float32
    assert error <= 1e-3
    Q = torch.linalg.qr(found.double()).Q
    turn = torch.linalg.eigh(Q.T @ M @ M.T @ Q).eigenvectors
    assert distance((Q @ turn.flip(-1))[:, :8], known_U[:, :8]) <= 1e-3


@pytest.mark.parametrize("scale", [0.0, -1.0])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_draft_that_is_no_help_is_replaced(scale: float, diagonal: bool) -> None:
    M, known_U = known(300, 300, log_spaced(300, 6))
    if diagonal:  # then the span of any coordinates is an invariant one
        M, known_U = log_spaced(300, 6).flip(0).diag(), torch.eye(300).double().flip(1)
    other = (known(300, 300, log_spaced(300, 6))[0] * scale).float()
    columns: list[int] = []
    stop = Stop(1e-4, 1e-3, 1e2)
    draft = counted(other, [])
    U, _, error = leading_pairs(counted(M, columns), random(300, 20), 4, stop, draft=draft)
    assert float(error) <= 1e-4
    assert distance(U, known_U[:, :4]) <= 1e-5
    assert sum(columns) > 3 * 20


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
    U, S, error = bottom(M, 4)
    best = float(sigma[-4:].norm())
    rounding = 120 * EPS * float(sigma[0])
    assert float((U.T @ M).norm()) <= 1.001 * best + rounding
    torch.testing.assert_close(S, sigma[-4:], rtol=0.001, atol=rounding)
    assert float(error) <= 1e-2 or name == "flat"  # no angle to be found, but the energy
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("digits", [4, 8, 12])
def test_bottom_does_not_square_the_condition(digits: int) -> None:
    sigma = steps(120, 4, (1, 10.0 ** (2 - digits), 10.0**-digits))
    M, known_U = known(120, 120, sigma)
    U, _, _ = bottom(M, 4)
    # M itself holds its smallest vectors to eps·σ₁ over the gap; a squared condition would be 1.
    assert distance(U, known_U[:, -4:]) <= 120 * EPS * 10.0**digits + 1e-6


@pytest.mark.parametrize("method", [top, bottom])
def test_a_batch_equals_one_by_one(method: Callable[..., tuple[Tensor, ...]]) -> None:
    spectra = [log_spaced(160, digits) for digits in (3, 6, 10)]
    M = torch.stack([known(160, 160, sigma)[0] for sigma in spectra] * 2).reshape(2, 3, 160, 160)
    U, S, stopped = method(M, 4)
    assert (U.shape, S.shape, stopped.shape) == ((2, 3, 160, 4), (2, 3, 4), (2, 3))
    for index in range(6):
        one_U, one_S, _ = method(M.reshape(6, 160, 160)[index], 4)
        together = U.reshape(6, 160, 4)[index]
        torch.testing.assert_close(S.reshape(6, 4)[index], one_S, rtol=1e-4, atol=0)
        assert distance(together, one_U) <= 1e-3


N = 40


def positive(*batch: int) -> Tensor:
    x = random(*batch, N, 2 * N)
    return x @ x.mT / N


def of_factors(W: Tensor, C: Tensor, *, upper: bool = False) -> tuple[Operators, Operators]:
    made = inverse_of_factors(W.clone(), C.clone(), upper=upper)
    assert made is not None
    return made


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_factors_undo_the_product_and_its_transpose(batch: tuple[int, ...], upper: bool) -> None:
    W, C, X = random(*batch, N, N), positive(*batch), random(*batch, N, 3)
    if upper:
        W = W.triu() + 10 * torch.eye(N)
    M = W @ C
    (half, back), (rough_half, rough_back) = of_factors(W, C, upper=upper)
    torch.testing.assert_close(M @ half(X), X, rtol=0, atol=1e-9)
    torch.testing.assert_close(M.mT @ back(X), X, rtol=0, atol=1e-9)
    for rough, fine in ((rough_half, half), (rough_back, back)):
        assert rough(X.float()).dtype == torch.float32
        assert (rough(X.float()) - fine(X)).norm() <= 1e-2 * fine(X).norm()
    # The float64 ones are not touched by the float32 ones.
    torch.testing.assert_close(M @ half(X), X, rtol=0, atol=1e-9)


def test_float32_is_hurt_by_the_condition_of_either_factor_not_of_the_product() -> None:
    torch.manual_seed(0)
    left, right, turn = (torch.linalg.qr(random(N, N)).Q for _ in range(3))
    W = (left * torch.logspace(0, -4, N).double()) @ right
    C = (turn * torch.logspace(0, -5, N).double()) @ turn.T
    assert float(torch.linalg.cond(W @ C)) > 1e6
    X = random(N, 3)
    half, _ = of_factors(W, C)[1]
    exact = torch.linalg.solve(W @ C, X)
    assert (half(X.float()) - exact).norm() <= 0.02 * exact.norm()
    M = (W @ C).float()  # as a product it is lost
    assert (torch.linalg.solve(M, X.float()) - exact).norm() > 0.05 * exact.norm()


def test_the_factors_take_the_place_of_the_matrices() -> None:
    W, C = random(N, N), positive()
    packed, root = torch.linalg.lu_factor(W.T)[0], torch.linalg.cholesky(C)
    assert inverse_of_factors(W, C, upper=False) is not None
    torch.testing.assert_close(W.T, packed)
    torch.testing.assert_close(C.T.tril(), root)


def test_a_covariance_that_cannot_be_factored_leaves_the_weight_as_it_was() -> None:
    W, C = random(2, N, N), positive(2)
    C[1, 3] = C[1, :, 3] = 0
    kept = W.clone()
    assert inverse_of_factors(W, C, upper=False) is None
    assert torch.equal(W, kept)


MADE: dict[str, Callable[[Tensor, Tensor], Operators]] = {
    "product": lambda W, C: inverse_of_product(W @ C),
    "factors": lambda W, C: of_factors(W, C)[0],
    "single": lambda W, C: of_factors(W, C)[1],
    "upper": lambda W, C: of_factors(W.triu(), C, upper=True)[0],
}


@pytest.mark.parametrize("name", MADE)
def test_a_singular_weight_gives_large_numbers_but_numbers(name: str) -> None:
    torch.manual_seed(0)
    X = torch.ones(N, 1, dtype=torch.float32 if name == "single" else torch.float64)
    for W in (random(N, 3) @ random(3, N), torch.zeros(N, N).double()):
        half, back = MADE[name](W, positive())
        assert bool(back(half(X)).isfinite().all())
