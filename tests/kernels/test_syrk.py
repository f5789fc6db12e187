from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise
from torch import Tensor

from corda_kernels import kernels
from corda_kernels.errors import BackendError
from corda_kernels.kernels import symmetrize_, syrk_, use_backend

BACKENDS = ("reference", "cpu")  # for triton see test_triton_syrk.py
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Ways in which an (n, d) tensor can lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "every_other_row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "columns_of_a_wider_one": lambda x: torch.cat([x + 1, x, x + 2], 1).chunk(3, 1)[1],
    "transposed": lambda x: x.T.contiguous().T,
    "offset": lambda x: torch.cat([x[:1] + 1, x])[1:] if len(x) else x,
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def random(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d).to(dtype)


def accumulator(d: int) -> Tensor:
    return torch.zeros(d, d)


def statistics(d: int) -> dict[str, Tensor]:
    return {
        "absmax": torch.zeros(d),
        "outlier_count": torch.zeros(d, dtype=torch.int64),
    }


def run(backend: str, c: Tensor, x: Any, **options: Any) -> Tensor:
    with use_backend(backend):
        return syrk_(c, x, **options)


def error(c: Tensor, x: Tensor) -> float:
    """Relative Frobenius error of c's lower triangle as xᵀx."""
    exact = (x.double().T @ x.double()).tril()
    return float((c.double().tril() - exact).norm() / exact.norm())


@pairwise(backend=BACKENDS, dtype=DTYPES[:3], layout=list(LAYOUTS), d=[33, 601])
def test_error_is_at_most_twice_that_of_plain_torch(
    backend: str, dtype: torch.dtype, layout: str, d: int
) -> None:
    x = LAYOUTS[layout](random(800, d, dtype))
    c = run(backend, accumulator(d), x)
    assert error(c, x) <= 2 * error(x.float().T @ x.float(), x)


def test_error_of_a_long_stream_is_at_most_twice_that_of_plain_torch(backend: str) -> None:
    x = random(20_000, 48) + 1  # a mean, so that the sums grow
    assert error(run(backend, accumulator(48), x), x) <= 2 * error(x.T @ x, x)


@st.composite
def _problems(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "n": draw(st.integers(0, 40)),
        "d": draw(st.sampled_from([1, 2, 5, 16, 33, 301])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "c_dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "alpha": draw(st.sampled_from([1.0, 0.25, -2.0, 0.0])),
        "threshold": draw(st.sampled_from([0.0, 0.5, 2.0, 6.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=60, deadline=None)
@given(problem=_problems())
def test_product_and_statistics_of_any_shape(backend: str, problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    n, d, alpha, threshold = (problem[key] for key in ("n", "d", "alpha", "threshold"))
    x = LAYOUTS[problem["layout"]](random(n, d, problem["dtype"]))
    c = random(d, d, torch.promote_types(problem["dtype"], problem["c_dtype"]))
    absmax = random(1, d)[0].abs()
    count = torch.arange(d, device=c.device)
    kept = x.double()
    exact = c.double() + alpha * kept.T @ kept
    # The classical bound on a sum of products in any order, γₙ |x|ᵀ|x|, and the sum with c.
    size = c.double().abs() + abs(alpha) * kept.abs().T @ kept.abs()
    bound = (n + 3) * torch.finfo(c.dtype).eps * size
    expected_absmax = torch.cat([kept.abs().float(), absmax[None]]).amax(0)
    expected_count = count + (kept.abs() > threshold).sum(0)

    result = run(
        backend,
        c,
        x,
        alpha=alpha,
        absmax=absmax,
        outlier_count=count,
        outlier_threshold=threshold,
    )

    assert result is c
    assert not bool(((c.double() - exact).abs() > bound).tril().any())
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(count, expected_count)


@pytest.mark.parametrize("d", [1, 33])
@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(backend: str, n: int, d: int) -> None:
    x = random(n, d)
    found = statistics(d)
    c = run(backend, accumulator(d), x, **found, outlier_threshold=0.5)
    torch.testing.assert_close(c.tril(), (x.T @ x).tril())
    assert torch.equal(found["absmax"], x.abs().sum(0))
    assert torch.equal(found["outlier_count"], (x.abs() > 0.5).sum(0))


@pytest.mark.parametrize("d", [33, 601])
def test_nothing_is_read_from_the_upper_triangle(backend: str, d: int) -> None:
    x = random(50, d)
    c = torch.full((d, d), torch.nan, device=x.device).triu(1)
    run(backend, c, x)
    torch.testing.assert_close(c.tril(), (x.T @ x).tril())


def test_a_list_counts_like_its_concatenation(backend: str) -> None:
    parts = [random(n, 33) for n in (5, 0, 1, 40)]
    apart, whole = statistics(33), statistics(33)
    options = {"alpha": 0.5, "outlier_threshold": 1.0}
    c = run(backend, accumulator(33), parts, **options, **apart)
    expected = run(backend, accumulator(33), torch.cat(parts), **options, **whole)
    torch.testing.assert_close(c.tril(), expected.tril())
    assert torch.equal(apart["absmax"], whole["absmax"])
    assert torch.equal(apart["outlier_count"], whole["outlier_count"])


def test_an_empty_list_changes_nothing(backend: str) -> None:
    c = random(4, 4)
    before = c.clone()
    assert torch.equal(run(backend, c, []), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_shows_on_the_diagonal(backend: str, value: float) -> None:
    x = random(40, 33)
    x[17, 5] = value
    diagonal = run(backend, accumulator(33), x).diagonal()
    assert (~torch.isfinite(diagonal)).nonzero().flatten().tolist() == [5]


def test_nan_counts_in_no_statistic(backend: str) -> None:
    x = random(9, 5)
    x[3, 1] = torch.nan
    x[:, 2] = torch.nan
    x[4, 1] = -7
    found = statistics(5)
    found["absmax"][2] = 3
    run(backend, accumulator(5), x, **found)
    assert found["absmax"].tolist() == [*x[:, :1].abs().amax(0), 7, 3, *x[:, 3:].abs().amax(0)]
    assert found["outlier_count"].tolist() == [0, 1, 0, 0, 0]


def test_x_may_require_grad_and_none_is_recorded(backend: str) -> None:
    x = random(8, 4).requires_grad_()
    assert not run(backend, accumulator(4), x).requires_grad


def test_x_is_left_alone(backend: str) -> None:
    x = random(8, 4)
    before = x.clone()
    run(backend, accumulator(4), x, alpha=3.0, **statistics(4))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": torch.zeros(4, 3)}, r"c must be \(d, d\)"),
        ({"c": torch.zeros(2, 4, 4)}, r"c must be \(d, d\)"),
        ({"c": torch.zeros(4, 4, dtype=torch.bfloat16)}, "float32 or float64"),
        ({"x": torch.zeros(5, 3)}, r"x must be \(n, 4\)"),
        ({"x": torch.zeros(4)}, r"x must be \(n, 4\)"),
        ({"x": torch.zeros(2, 5, 4)}, r"x must be \(n, 4\)"),
        ({"x": torch.zeros(5, 4, dtype=torch.int64)}, "floating dtype"),
        ({"x": torch.zeros(5, 4, device="meta")}, "on meta"),
        ({"x": [torch.zeros(5, 4), torch.zeros(5, 3)]}, r"x must be \(n, 4\)"),
        ({"absmax": torch.zeros(3)}, r"absmax must be \(4,\)"),
        (
            {"absmax": torch.zeros(4, dtype=torch.float64)},
            r"absmax must be \(4,\) in torch.float32",
        ),
        ({"outlier_count": torch.zeros(4)}, r"outlier_count must be \(4,\) in torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    fitting = {"c": torch.zeros(4, 4), "x": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=message):
        syrk_(**(fitting | changes))


@pairwise(
    backend=BACKENDS,
    shape=[(0, 0), (1, 1), (7, 7), (33, 33), (3, 5, 5), (2, 0, 4, 4), (2, 192, 192), (3, 450, 450)],
    dtype=[torch.float32, torch.float64],
)
def test_symmetrize_copies_the_lower_triangle(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    c = torch.randn(shape, dtype=dtype)
    lower = c.tril()
    c += torch.full_like(c, torch.nan).triu(1)
    with use_backend(backend):
        assert symmetrize_(c) is c
    assert torch.equal(c.tril(), lower)
    assert torch.equal(c, c.mT)


def test_symmetrize_works_in_place_on_a_strided_matrix(backend: str) -> None:
    wide = random(6, 12)
    c = wide[:, ::2]
    rest, lower = wide[:, 1::2].clone(), c.tril()
    with use_backend(backend):
        symmetrize_(c)
    assert torch.equal(c.tril(), lower)
    assert torch.equal(c, c.mT)
    assert torch.equal(wide[:, 1::2], rest)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 4, 3)])
def test_symmetrize_refuses_what_is_not_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="c must be"):
        symmetrize_(torch.zeros(shape))


def test_use_backend_holds_inside_its_block_only(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for key in list(kernels._TABLE):
        if key[0] == "syrk_":
            monkeypatch.setitem(kernels._TABLE, key, lambda *_, name=key[1]: calls.append(name))
    c, x = accumulator(4), random(2, 4)
    syrk_(c, x)
    with contextlib.suppress(KeyError), use_backend(backend):
        syrk_(c, x)
        with use_backend("reference"):
            syrk_(c, x)
        syrk_(c, x)
        raise KeyError
    syrk_(c, x)
    by_device = calls[0]
    assert calls == [by_device, backend, "reference", backend, by_device]


def test_a_backend_that_cannot_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    others = {name: lambda name=name: asked.append(name) for name in ("first", "last")}
    reasons = {"first": others["first"], backend: lambda: "no such device", "last": others["last"]}
    monkeypatch.setattr(kernels, "_WHY_NOT", reasons)
    with pytest.raises(BackendError, match="no such device"), use_backend(backend):
        pass
    assert not asked
    unknown = pytest.raises(BackendError, match=f"no backend 'abacus'; known: first, {backend}")
    with unknown, use_backend("abacus"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-5)])
def test_half_a_million_tokens_do_not_drift_in_512_calls(
    dtype: torch.dtype, allowed: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    totals = {backend: accumulator(128) for backend in BACKENDS}
    exact = torch.zeros(128, 32, dtype=torch.float64)  # every fourth column: the rest is alike
    for _ in range(524_288 // 32768):
        x = torch.randn(32768, 128, generator=generator).to(dtype)
        exact.addmm_(x.double().T, x[:, ::4].double())
        for backend, c in totals.items():
            for part in torch.split(x, 1024):
                run(backend, c, part)
    lower = torch.ones(128, 128).tril().bool()[:, ::4]
    for c in totals.values():
        error = (c[:, ::4].double() - exact)[lower].norm()
        assert float(error / exact[lower].norm()) <= allowed


def test_numpy_arrays_are_taken_without_a_copy(backend: str) -> None:
    x = random(50, 20).numpy()
    c, absmax = accumulator(20).numpy(), statistics(20)["absmax"].numpy()
    assert run(backend, c, x, absmax=absmax) is c
    exact = torch.from_numpy(x.T @ x).tril()
    torch.testing.assert_close(torch.from_numpy(c).tril(), exact, rtol=1e-5, atol=1e-5)
    assert (absmax == abs(x).max(0)).all()


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an array"):
        syrk_(accumulator(2), "text")
