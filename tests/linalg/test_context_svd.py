from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from pairs import pairwise
from problems import (
    ENDS,
    EPS,
    METHODS,
    NULL,
    PROBLEMS,
    RANK,
    SHAPES,
    SINGULAR,
    Problem,
    difference,
    is_orthonormal,
    log_spaced,
    of_tokens,
    orthonormal,
    planted,
    problem,
    projection,
    random,
    reference,
    steps,
)
from torch import Tensor

from corda_kernels.errors import (
    ConfigError,
    ConvergenceWarning,
    DecompositionError,
    RankError,
)
from corda_kernels.linalg import CoSVD, co_svd, context_svd, krylov


def quietly(*args: Any, **options: Any) -> CoSVD:
    """`co_svd` where falling back on the exact method is as good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return co_svd(*args, **options)


@pytest.mark.slow
@pairwise(name=list(PROBLEMS), way=list(itertools.product(ENDS, METHODS)), shape=list(SHAPES))
def test_keeps_the_directions_that_a_plain_svd_keeps(
    name: str, way: tuple[str, str], shape: str
) -> None:
    which, method = way
    W, C = problem(name, shape)
    U_ref, S_ref = reference(name, shape)
    found = quietly(W, C, rank=RANK, which=which, method=method)
    kept = slice(RANK) if which == "largest" else slice(-RANK, None)
    first, best = float(S_ref[0]), float(S_ref[kept].norm())
    rounding = RANK**0.5 * W.shape[1] * EPS * first

    assert is_orthonormal(found.U)
    assert found.S.tolist() == sorted(found.S.tolist(), reverse=True)
    torch.testing.assert_close(found.S, S_ref[kept], rtol=0.01, atol=rounding)
    energies = (found.U.T @ (W.double() @ C.double())).norm(dim=1)
    torch.testing.assert_close(energies, found.S, rtol=0.01, atol=rounding)  # pair by pair
    energy = float(energies.norm())
    if which == "smallest":
        # 1 is optimal; the randomised method stops at 1 + 1e-4 or so.
        assert energy <= (1 if method == "exact" else 1.001) * best * (1 + 1e-4) + rounding
        return
    assert energy >= best * (1 - 1e-8)
    # Perturbed by eps·σ₁, a subspace turns by eps·σ₁ over the gap; an iteration stops at 2e-5.
    gap = float(S_ref[RANK - 1] - S_ref[RANK])
    if gap > 1e-6 * first:
        stopped = 0 if method == "exact" else 1e-5
        assert difference(found.U, U_ref[:, kept], W) <= 1e3 * EPS * first / gap + stopped


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["square", "tall"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_solving_with_the_factors_leads_to_the_same_directions(
    name: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(krylov, "_SOLVED_BLOCKS", 0)
    made: list[object] = []
    of = krylov.inverse_of_factors
    monkeypatch.setattr(
        krylov, "inverse_of_factors", lambda *a, **k: made.append(of(*a, **k)) or made[-1]
    )
    W, C = (matrix.clone() for matrix in problem(name, shape))
    test_keeps_the_directions_that_a_plain_svd_keeps(name, ("smallest", "randomized"), shape)
    assert all(map(torch.equal, problem(name, shape), (W, C)))
    assert len(made) == 1
    if name not in SINGULAR:
        assert (made[0] is None) == (name == "single_token")
        found = quietly(W, C, rank=RANK, which="smallest", method="randomized")
        assert float(found.residual) > 0 or name in NULL


@pytest.mark.parametrize("solved", [0, 1000])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("factors", [(1e25, 1e-25), (1e-30, 1e30), (1e30, 1e30), (1e-25, 1e-25)])
def test_a_start_in_float32_does_not_go_by_the_units(
    factors: tuple[float, float], which: str, solved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(krylov, "_SOLVED_BLOCKS", solved)
    W, C = problem("gaussian", "square")
    options = {"rank": RANK, "which": which, "method": "randomized"}
    plain = co_svd(W, C, **options)
    scaled = co_svd(W.double() * factors[0], C * factors[1], **options)
    assert 0 < float(scaled.residual) <= (1e-4 if which == "largest" else 3e-3)
    assert difference(scaled.U, plain.U, W) <= (1e-5 if which == "largest" else 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("spectrum", ["steps", "log_spaced"])
def test_finds_the_vectors_that_were_planted(
    spectrum: str, which: str, method: str, shape: str
) -> None:
    n = min(SHAPES[shape])
    sigma = steps(n) if spectrum == "steps" else log_spaced(n, 6)
    W, C, U = planted(*SHAPES[shape], sigma)
    found = quietly(W, C, rank=RANK, which=which, method=method)
    kept = slice(RANK) if which == "largest" else slice(-RANK, None)
    torch.testing.assert_close(found.S, sigma[kept], rtol=1e-3, atol=0)
    bound = 1e-7 if method == "exact" else {"largest": 1e-5, "smallest": 1e-3}[which]
    assert difference(found.U, U[:, kept], W) <= bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [1e-7, 1e-9])
@pytest.mark.parametrize("name", SINGULAR)
def test_unseen_directions_are_ordered_as_a_vanishing_damping_would(
    name: str, damping: float, shape: str
) -> None:
    W, C = problem(name, shape)
    found = co_svd(W, C, rank=RANK, which="smallest")
    if name == "zero_covariance":  # any multiple of the identity, however small
        limit = co_svd(W, torch.eye(W.shape[1]), rank=RANK, which="smallest")
    else:
        limit = co_svd(W, C, rank=RANK, which="smallest", damping=damping)
    # The damped one carries rounding of eps·σ₁/λ; measured at most 1.5e-12/λ.
    assert difference(found.U, limit.U, W) <= 5e-12 / damping


@pytest.mark.parametrize("shape", SHAPES)
def test_more_of_the_largest_than_the_covariance_sees_are_ordered_too(shape: str) -> None:
    W, C = problem("single_token", shape)
    limit = co_svd(W, C, rank=RANK, damping=1e-7).U
    assert difference(co_svd(W, C, rank=RANK).U, limit, W) <= 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", ["gaussian", "few_tokens", "single_token", "dead_channels"])
def test_vectors_of_a_tall_weight_lie_in_its_range(name: str, which: str, method: str) -> None:
    W, C = problem(name, "tall")
    U = quietly(W, C, rank=RANK, which=which, method=method).U
    assert float((U - projection(torch.linalg.qr(W).Q, U)).norm()) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_all_pairs_at_once(shape: str) -> None:
    W, C = problem("gaussian", shape)
    rank = min(W.shape)
    U_ref, S_ref = reference("gaussian", shape)
    for which in ENDS:
        found = co_svd(W, C, rank=rank, which=which)
        torch.testing.assert_close(found.S, S_ref)
        assert difference(found.U, U_ref, W) <= 1e-12


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ENDS)
def test_the_smallest_shapes(which: str, method: str, shape: tuple[int, int]) -> None:
    W, C = random(*shape), of_tokens(9, shape[1])
    found = quietly(W, C, rank=1, which=which, method=method)
    S_ref = torch.linalg.svdvals(W @ C)
    torch.testing.assert_close(found.S, S_ref[[0 if which == "largest" else -1]])
    torch.testing.assert_close((found.U.T @ W @ C).norm(), found.S[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ENDS)
def test_damping_is_a_multiple_of_the_mean_diagonal(which: str, method: str) -> None:
    W, C = problem("covariance_to_1e-12", "wide")
    found = co_svd(W, C, rank=RANK, which=which, method=method, damping=0.01)
    damped = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    same = co_svd(W, damped, rank=RANK, which=which, method=method)
    torch.testing.assert_close(found.S, same.S, rtol=1e-6, atol=0)
    assert difference(found.U, same.U, W) <= 1e-6
    assert float(found.damping) == 0.01
    # Units of the calibration data do not matter.
    scaled = co_svd(W, 100 * C, rank=RANK, which=which, method=method, damping=0.01)
    torch.testing.assert_close(scaled.S, 100 * found.S, rtol=1e-6, atol=0)
    assert difference(scaled.U, found.U, W) <= 1e-6


def test_no_damping_is_a_damping_of_zero() -> None:
    W, C = problem("gaussian", "wide")
    none, zero = co_svd(W, C, rank=RANK), co_svd(W, C, rank=RANK, damping=0.0)
    assert torch.equal(none.U, zero.U)
    assert float(none.damping) == float(zero.damping) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_equals_one_by_one(shape: str, which: str, method: str) -> None:
    names = ["product_to_1e-12", "covariance_to_1e-12", "gaussian", "few_tokens"]
    parts = zip(*(problem(name, shape) for name in names), strict=True)
    W, C = (torch.stack(part).unflatten(0, (2, 2)) for part in parts)
    options = {"rank": RANK, "which": which, "method": method, "damping": 1e-4}
    found = co_svd(W, C, **options)
    assert found.U.shape == (2, 2, W.shape[-2], RANK)
    assert found.S.shape == (2, 2, RANK)
    assert found.damping.shape == found.residual.shape == (2, 2)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        alone = quietly(W[i, j], C[i, j], **options)
        torch.testing.assert_close(found.S[i, j], alone.S, rtol=1e-3, atol=0)
        # Two roundings of one problem: eps·cond over the gap, which is at least 1e-2 here.
        gap = {"exact": 1e-4, "randomized": 1e-3}[method]
        assert difference(found.U[i, j], alone.U, W[i, j]) <= gap


def test_null_directions_of_a_batch_are_ordered_one_by_one() -> None:
    names = ["gaussian", "few_tokens", "single_token", "zero_covariance"]
    parts = [problem(name, "wide") for name in names]
    W = torch.stack([w.double() for w, _ in parts])
    C = torch.stack([c.double() for _, c in parts])
    together = co_svd(W, C, rank=RANK, which="smallest")
    for index in range(4):
        alone = co_svd(W[index], C[index], rank=RANK, which="smallest")
        assert difference(together.U[index], alone.U, W[index]) <= 1e-9


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_computed_in_float64(dtype: torch.dtype, which: str) -> None:
    W, C = problem("covariance_to_1e-12", "wide")
    W, C = W.to(dtype), (1e3 * C).float()
    found = co_svd(W, C, rank=RANK, which=which)
    expected = co_svd(W.double(), C.double(), rank=RANK, which=which)
    assert {t.dtype for t in (found.U, found.S, found.damping, found.residual)} == {torch.float64}
    assert torch.equal(found.U, expected.U)
    assert torch.equal(found.S, expected.S)


@pytest.mark.parametrize("method", METHODS)
def test_strided_and_shared_inputs(method: str) -> None:
    W, C = problem("product_to_1e-12", "wide")
    expected = co_svd(W, C, rank=RANK, which="smallest", method=method)
    strided = torch.stack([C, C + 1], -1)[..., 0]
    options = {"rank": RANK, "which": "smallest", "method": method}
    found = co_svd(W.T.contiguous().T.requires_grad_(), strided, **options)
    torch.testing.assert_close(found.S, expected.S, rtol=1e-3, atol=0)
    assert not found.U.requires_grad
    # Layers that share a covariance, as q, k and v do.
    shared = co_svd(W.expand(3, -1, -1), C.expand(3, -1, -1), **options)
    torch.testing.assert_close(shared.S, expected.S.expand(3, -1), rtol=1e-3, atol=0)


def test_inputs_are_left_alone() -> None:
    W, C = (t.clone() for t in problem("few_tokens", "tall"))
    co_svd(W, C, rank=RANK, which="smallest", damping=0.01)
    expected = problem("few_tokens", "tall")
    assert torch.equal(W, expected[0])
    assert torch.equal(C, expected[1])


@pytest.mark.parametrize("which", ENDS)
def test_random_numbers_come_from_the_seed_alone(which: str) -> None:
    W, C = problem("product_to_1e-12", "wide")

    def run(**seed: int) -> Tensor:
        return co_svd(W, C, rank=RANK, which=which, method="randomized", **seed).U

    state = torch.get_rng_state()
    assert torch.equal(run(), run(seed=0))
    assert torch.equal(run(seed=7), run(seed=7))
    assert not torch.equal(run(seed=7), run(seed=8))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", ["product_to_1e-12", "covariance_to_1e-12"])
def test_the_randomised_method_manages_decaying_spectra_itself(name: str, which: str) -> None:
    found = co_svd(*problem(name, "wide"), rank=RANK, which=which, method="randomized")
    assert 0 < float(found.residual) <= (1e-4 if which == "largest" else 1e-2)


def nearly_flat(n: int) -> Problem:
    return orthonormal(n, n) * torch.linspace(1, 0.9, n), torch.eye(n).double()


@pytest.mark.parametrize("which", ENDS)
def test_what_does_not_converge_is_left_to_the_exact_method_with_a_warning(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(krylov, "_MOST_CYCLES", 1)
    monkeypatch.setattr(krylov, "_MOST_BLOCKS", 1)
    W, C = nearly_flat(200)
    options = {"rank": RANK, "which": which}
    with pytest.warns(ConvergenceWarning, match="did not converge .*exact one ran") as log:
        found = co_svd(W, C, method="randomized", **options)
    assert log[0].filename == __file__
    exact = co_svd(W, C, method="exact", **options)
    assert torch.equal(found.U, exact.U)
    assert float(found.residual) == float(exact.residual) == 0


def test_those_of_a_batch_that_converge_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "_MOST_CYCLES", 1)
    good, bad = problem("product_to_1e-12", "square"), nearly_flat(240)
    W, C = (torch.stack(pair) for pair in zip(good, bad, strict=True))
    with pytest.warns(ConvergenceWarning):
        found = co_svd(W, C, rank=RANK, method="randomized")
    assert 0 < float(found.residual[0]) < 1e-4
    assert float(found.residual[1]) == 0
    assert torch.equal(found.U[1], co_svd(*bad, rank=RANK, method="exact").U)


def test_unseen_directions_are_left_to_the_exact_method_in_silence() -> None:
    W, C = problem("few_tokens", "wide")
    found = co_svd(W, C, rank=RANK, which="smallest", method="randomized")
    assert torch.equal(found.U, co_svd(W, C, rank=RANK, which="smallest", method="exact").U)


@pytest.mark.parametrize(
    ("size", "rank", "iterates"), [(100, RANK, True), (200, RANK, False), (100, 30, False)]
)
def test_auto_goes_by_size(
    size: int, rank: int, iterates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_svd, "_DENSE_SIZE", size)
    found = co_svd(*problem("product_to_1e-12", "wide"), rank=rank, damping=1e-3)
    assert (float(found.residual) > 0) == iterates


class OnMPS(Tensor):
    """Says that it is on a device without float64."""

    device = torch.device("mps")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"which": "top"}, ConfigError, 'which must be "largest" or "smallest", got \'top\''),
        ({"method": "lanczos"}, ConfigError, "method must be"),
        ({"damping": -0.1}, ConfigError, "damping must be at least 0"),
        ({"damping": torch.inf}, ConfigError, "damping must be at least 0 and finite"),
        ({"damping": torch.nan}, ConfigError, "damping must be at least 0 and finite"),
        ({"rank": 0}, RankError, r"rank for a weight of 5 × 8 must be .* got 0"),
        ({"rank": 6}, RankError, "must be a whole number from 1 to 5, got 6"),
        ({"weight": torch.ones(8)}, DecompositionError, "needs a covariance"),
        ({"weight": torch.ones(5, 7)}, DecompositionError, r"got \(8, 8\)"),
        ({"weight": torch.ones(2, 5, 8)}, DecompositionError, "needs a covariance"),
        ({"covariance": torch.ones(8, 7)}, DecompositionError, r"got \(8, 7\)"),
        ({"weight": torch.full((5, 8), torch.nan)}, DecompositionError, "weight holds NaN or Inf"),
        ({"weight": torch.full((5, 8), torch.inf)}, DecompositionError, "weight holds NaN or Inf"),
        ({"covariance": torch.full((8, 8), torch.nan)}, DecompositionError, "covariance holds NaN"),
        ({"weight": torch.ones(5, 8).as_subclass(OnMPS)}, DecompositionError, "move it to the CPU"),
    ],
)
def test_what_is_impossible_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"weight": torch.ones(5, 8), "covariance": torch.eye(8), "rank": 2} | changes
    with pytest.raises(error, match=message):
        co_svd(options.pop("weight"), options.pop("covariance"), **options)


@pytest.mark.parametrize("which", ENDS)
def test_an_empty_batch_of_large_matrices_has_an_empty_result(which: str) -> None:
    found = co_svd(torch.zeros(0, 400, 300), torch.zeros(0, 300, 300), rank=4, which=which)
    assert (found.U.shape, found.S.shape) == ((0, 400, 4), (0, 4))


def test_channels_that_float32_cannot_hold_at_once_are_found() -> None:
    # Whatever float32 makes of it, each vector by itself is invariant.
    w, c = torch.linspace(1, 0.1, 400), torch.ones(400)
    w[::2] *= 1e-23
    c[1::2] *= 1e-23
    w[-1] *= 30
    found = co_svd(w.diag(), c.diag(), rank=4)
    expected = (w.double() * c.double()).sort(descending=True).values
    torch.testing.assert_close(found.S, expected[:4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_float32_inputs_of_odd_units_are_iterated_with(scale: float, which: str) -> None:
    W, C = (matrix.float() for matrix in problem("gaussian", "square"))
    options = {"rank": RANK, "which": which, "method": "randomized"}
    plain = co_svd(W, C, **options)
    for scaled in (co_svd(scale * W, C, **options), co_svd(W, scale * C, **options)):
        assert float(scaled.residual) > 0
        torch.testing.assert_close(scaled.S / scale, plain.S, rtol=1e-4, atol=0)


def test_what_leaves_the_range_of_float64_is_refused() -> None:
    W, C = problem("gaussian", "square")
    with pytest.raises(DecompositionError, match="leaves the range of float64: scale the"):
        co_svd(W.double() * 1e160, C * 1e160, rank=RANK, method="randomized")


def test_of_a_triangle_alone_nothing_is_made() -> None:
    W, C = problem("gaussian", "square")
    with pytest.raises(DecompositionError, match="not symmetric: if only a triangle of it is fill"):
        co_svd(W, C.tril(), rank=RANK)


def test_an_empty_batch_has_an_empty_result() -> None:
    found = co_svd(torch.zeros(0, 6, 8), torch.zeros(0, 8, 8), rank=2)
    assert (found.U.shape, found.S.shape, found.residual.shape) == ((0, 6, 2), (0, 2), (0,))
