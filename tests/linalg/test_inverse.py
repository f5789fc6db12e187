from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import pairwise
from torch import Tensor

from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.linalg import extreme_eigenvalues, inverse, regularized_inverse

DTYPES = [torch.float64, torch.float32]


@pytest.fixture(params=["dense", "lanczos"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which `extreme_eigenvalues` goes, whatever the size."""
    if request.param == "lanczos":
        monkeypatch.setattr(inverse, "_DENSE_SIZE", 0)
    return request.param


def of_tokens(n: int, d: int, *, outlier: float = 1.0) -> Tensor:
    x = torch.randn(n, d, dtype=torch.float64)
    x[:, 3] *= outlier
    return x.T @ x / n


def log_spaced(d: int, condition: float) -> Tensor:
    """A symmetric float64 matrix with log-spaced eigenvalues and random eigenvectors."""
    eigenvalues = torch.logspace(0, -1, d, base=condition, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    c = (q * eigenvalues) @ q.T
    return (c + c.T) / 2


def with_dead_channels(d: int) -> Tensor:
    c = of_tokens(4 * d, d)
    c[::4] = 0
    c[:, ::4] = 0
    return c


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "well_conditioned": lambda d: of_tokens(4 * d, d),
    "log_spaced": lambda d: log_spaced(d, 1e12),
    "outlier_channel": lambda d: of_tokens(4 * d, d, outlier=1e6),
    "few_tokens": lambda d: of_tokens(d // 3, d),
    "single_token": lambda d: of_tokens(1, d),
    "dead_channels": with_dead_channels,
}


def damped(c: Tensor, share: Tensor) -> Tensor:
    """C + λI in float64, λ = share times the mean diagonal."""
    c = c.double()
    shift = share.double() * c.diagonal(dim1=-2, dim2=-1).mean(-1)
    return c + shift[..., None, None] * torch.eye(c.shape[-1], dtype=torch.float64)


def condition(c: Tensor) -> float:
    """λmax/λmin, infinite for what is not positive definite."""
    smallest, largest = torch.linalg.eigvalsh(c.double())[[0, -1]].tolist()
    return largest / smallest if smallest > 0 else torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_inverts_the_matrix_with_the_damping_it_reports(name: str, dtype: torch.dtype) -> None:
    c = MATRICES[name](40).to(dtype)
    found = regularized_inverse(c)
    shifted = damped(c, found.damping)
    exact = torch.linalg.inv(shifted)
    # The relative error of an inverse is about eps·condition; measured at most 0.3 of it.
    error = (found.inverse.double() - exact).norm() / exact.norm()
    assert float(error) <= torch.finfo(dtype).eps * condition(shifted)
    assert found.inverse.dtype == dtype
    assert torch.equal(found.inverse, found.inverse.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("digits", [1, 3])  # that the default leaves, and two more
@pytest.mark.parametrize("name", ["well_conditioned", "few_tokens", "single_token"])
def test_damping_is_the_least_that_reaches_the_condition(
    name: str, digits: int, dtype: torch.dtype
) -> None:
    eps = torch.finfo(dtype).eps
    allowed = 10.0**-digits / eps
    c = MATRICES[name](40).to(dtype)
    found = regularized_inverse(c, max_condition=None if digits == 1 else allowed)
    # λmin of a matrix of that condition is known to 10 % in its own dtype.
    assert condition(damped(c, found.damping)) <= 1.1 * allowed
    if name == "well_conditioned":
        assert (int(found.attempts), float(found.damping)) == (1, 0.0)
    else:
        assert float(found.damping) == pytest.approx(eps * 10.0 ** (int(found.attempts) - 2))
        assert condition(damped(c, found.damping / 10)) > allowed / 1.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attempts_go_from_none_to_eps_and_then_tenfold(dtype: torch.dtype) -> None:
    # The mean is 2/3: λ = 2/3·eps·10ᵏ makes the condition 1.5/(eps·10ᵏ), and k = 2 does.
    found = regularized_inverse(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=dtype)))
    assert int(found.attempts) == 4
    assert float(found.damping) == pytest.approx(100 * torch.finfo(dtype).eps)


def test_a_large_damping_counts_at_both_ends_of_the_spectrum() -> None:
    c = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    found = regularized_inverse(c, max_condition=2.0)
    # λ = 0.79 would do if λmax stayed 1.
    assert condition(damped(c, found.damping)) <= 2
    assert float(found.damping) == pytest.approx(1e8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6, 1)])
def test_matrices_of_a_batch_do_not_influence_each_other(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    apart = [make(20) * 10**i for i, make in enumerate(MATRICES.values())]
    batch = torch.stack(apart).to(dtype)
    found = regularized_inverse(batch.reshape(*shape, 20, 20))
    assert (found.damping.shape, found.attempts.shape) == (shape, shape)
    for i, c in enumerate(batch):
        alone = regularized_inverse(c)
        assert torch.equal(found.damping.reshape(-1)[i], alone.damping)
        assert torch.equal(found.attempts.reshape(-1)[i], alone.attempts)
        torch.testing.assert_close(found.inverse.reshape(6, 20, 20)[i], alone.inverse)
    assert len(set(found.attempts.flatten().tolist())) > 1


@pytest.mark.parametrize("name", MATRICES)
def test_a_fixed_damping_is_taken_as_it_is(name: str) -> None:
    c = MATRICES[name](40)
    found = regularized_inverse(c, damping=0.01)
    assert (float(found.damping), int(found.attempts)) == (0.01, 1)
    exact = damped(c, found.damping)
    error = (found.inverse @ exact - torch.eye(40)).norm()
    assert float(error) <= 40 * torch.finfo(torch.float64).eps * condition(exact)


def test_only_the_lower_triangle_is_read() -> None:
    c = of_tokens(80, 20)
    masked = c.tril() + torch.full_like(c, torch.nan).triu(1)
    assert torch.equal(regularized_inverse(masked).inverse, regularized_inverse(c).inverse)
    assert extreme_eigenvalues(masked) == extreme_eigenvalues(c)


def test_input_is_left_alone_and_may_be_strided_or_require_grad() -> None:
    c = of_tokens(10, 40)[::2, ::2].requires_grad_()
    before = c.detach().clone()
    found = regularized_inverse(c)
    assert not found.inverse.requires_grad
    assert torch.equal(c, before)
    assert torch.equal(found.inverse, regularized_inverse(before).inverse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -0.01}, "damping must be at least 0"),
        ({"max_condition": 0.5}, "max_condition must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        regularized_inverse(torch.eye(3), **options)


@pytest.mark.parametrize("function", [regularized_inverse, extreme_eigenvalues])
@pytest.mark.parametrize(
    "matrix",
    [torch.ones(3), torch.ones(3, 4), torch.eye(3).bfloat16(), torch.eye(3, dtype=torch.int64)],
)
def test_what_is_not_a_square_of_floats_is_refused(
    function: Callable[[Tensor], Any], matrix: Tensor
) -> None:
    with pytest.raises(DecompositionError, match="matrix must "):
        function(matrix)


NOT_INVERTIBLE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "few_tokens": (lambda: of_tokens(5, 20), "too few tokens"),
    "dead_channels": (lambda: with_dead_channels(20), "5 channels are dead"),
    "nan": (lambda: torch.full((20, 20), torch.nan), "NaN or Inf"),
    "inf": (lambda: torch.eye(20).index_fill(0, torch.tensor([7]), torch.inf), "NaN or Inf"),
    "indefinite": (lambda: torch.diag(torch.linspace(-1, 1, 20)), "cannot be inverted"),
}
UNDAMPED = {
    "inverse": lambda c: regularized_inverse(c, damping=0.0),
    "extremes": extreme_eigenvalues,
}


@pytest.mark.parametrize("function", UNDAMPED)
@pytest.mark.parametrize("name", NOT_INVERTIBLE)
@pytest.mark.usefixtures("way")
def test_error_names_the_matrix_and_the_cause(name: str, function: str) -> None:
    make, cause = NOT_INVERTIBLE[name]
    batch = torch.stack([torch.eye(20, dtype=torch.float64), make().double()])
    with pytest.raises(DecompositionError, match=rf"matrix 1 of .*\(20 channels\).*{cause}"):
        UNDAMPED[function](batch)


def test_error_after_twelve_attempts_says_what_was_reached() -> None:
    with pytest.raises(DecompositionError, match=r"damping of 2\.2e-06 .* 4 channels are dead"):
        regularized_inverse(torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_error_names_what_is_not_finite_when_damping_is_sought(value: float) -> None:
    c = of_tokens(80, 20)
    c[3, 4] = c[4, 3] = value
    with pytest.raises(DecompositionError, match="NaN or Inf"):
        regularized_inverse(c)


@pairwise(d=[1, 2, 5, 20, 21, 64, 300, 500], limit=[1e1, 1e3, 1e6], dtype=DTYPES)
def test_extreme_eigenvalues_of_log_spaced_spectra(
    d: int, limit: float, dtype: torch.dtype, way: str
) -> None:
    c = log_spaced(d, limit).to(dtype)
    exact = torch.linalg.eigvalsh(c.double())
    largest, smallest = extreme_eigenvalues(c)
    assert largest.dtype == smallest.dtype == dtype
    # 1 %, but where hundreds of eigenvalues lie close; there measured at most 2.8 %.
    tolerance = 0.01 if d <= 64 or limit == 1e6 else 0.03
    if way == "dense":
        tolerance = 1e-5
    assert float(largest) == pytest.approx(float(exact[-1]), rel=tolerance)
    # In float32 λmin itself is only known to eps·condition.
    slack = torch.finfo(dtype).eps * condition(c)
    assert float(smallest) == pytest.approx(float(exact[0]), rel=tolerance + slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 30])
@pytest.mark.usefixtures("way")
def test_an_exhausted_krylov_space_does_no_harm(d: int, dtype: torch.dtype) -> None:
    # 3·I exhausts it at once, two distinct eigenvalues after two steps.
    two = torch.where(torch.arange(d) % 2 == 0, 3.0, 0.5)
    batch = torch.stack([3 * torch.eye(d), torch.diag(two)]).to(dtype)
    largest, smallest = extreme_eigenvalues(batch)
    torch.testing.assert_close(largest, torch.full((2,), 3.0, dtype=dtype))
    expected = torch.stack([torch.tensor(3.0), two.min()]).to(dtype)
    torch.testing.assert_close(smallest, expected)


def test_extreme_eigenvalues_of_a_batch_equal_one_by_one() -> None:
    batch = torch.stack([log_spaced(30, 10.0**k) for k in range(6)]).reshape(2, 3, 30, 30)
    largest, smallest = extreme_eigenvalues(batch)
    assert largest.shape == smallest.shape == (2, 3)
    alone = [extreme_eigenvalues(c) for c in batch.reshape(6, 30, 30)]
    torch.testing.assert_close(largest.flatten(), torch.stack([a for a, _ in alone]))
    torch.testing.assert_close(smallest.flatten(), torch.stack([b for _, b in alone]))
