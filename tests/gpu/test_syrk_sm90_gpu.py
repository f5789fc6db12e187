"""The kernel for compute capability 9.0 on a GPU, against float64 and plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import gram
from pairs import pairwise
from torch import Tensor

from corda_kernels.kernels import available_backends, reference, syrk_, use_backend

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a CUDA device of compute capability 9.0",
)

DTYPES = [torch.bfloat16, torch.float16]
# Relative Frobenius error allowed to the truncation of the tensor cores, by precision.
ALLOWED = {"default": 5e-5, "high": 1e-5}
THRESHOLD = 1.5


@pytest.fixture(autouse=True)
def _available() -> None:
    reason = available_backends()["sm90"]
    if reason is not None and "CuPy is not installed" in reason:
        pytest.skip(reason)
    assert reason is None


def random(n: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows that start at multiples of 16 bytes, and NaN beyond them."""
    generator = torch.Generator("cuda").manual_seed(n + d)
    x = torch.full((n, -(-d // 8) * 8), torch.nan, dtype=dtype, device="cuda")
    x[:, :d] = torch.randn(n, d, device="cuda", generator=generator).to(dtype)
    return x[:, :d]


def run(x: Any, d: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """C inside a guard that must stay, and the statistics."""
    whole = torch.full((d + 64, -(-d // 4) * 4 + 64), 7.0, device="cuda")
    c = whole[:d, :d].zero_()
    absmax = torch.zeros(d, device="cuda")
    count = torch.zeros(d, dtype=torch.int64, device="cuda")
    with use_backend("sm90"):
        syrk_(c, x, absmax=absmax, outlier_count=count, outlier_threshold=THRESHOLD, **options)
    assert bool((whole[d:] == 7).all())
    assert bool((whole[:, d:] == 7).all())
    return c, absmax, count


def check(found: tuple[Tensor, Tensor, Tensor], x: Tensor, allowed: float = 5e-5) -> None:
    c, absmax, count = found
    exact = gram(x).tril()
    assert float((c.double().tril() - exact).norm() / exact.norm()) <= allowed
    expected = torch.zeros_like(absmax), torch.zeros_like(count)
    reference.channel_statistics_(x, *expected, THRESHOLD)
    assert torch.equal(absmax, expected[0])
    assert torch.equal(count, expected[1])


@pairwise(
    n=[1, 63, 100, 1000, 5000, 8192, 20_000],
    d=[8, 40, 100, 252, 256, 576, 1000, 1536, 2048, 4096, 4160],
    dtype=DTYPES,
    deterministic=[False, True],
)
def test_any_shape(n: int, d: int, dtype: torch.dtype, deterministic: bool) -> None:
    x = random(n, d, dtype)
    check(run(x, d, deterministic=deterministic), x)


@pytest.mark.parametrize("repeats", range(20))
def test_no_run_is_different(repeats: int) -> None:
    """What races would show at some time, and a deadlock as a test that does not end."""
    x = random(8192 + 64 * repeats, 2048)
    check(run(x, 2048), x)


@pytest.mark.parametrize("d", [576, 1536, 4096])
def test_deterministic_runs_are_equal_bit_for_bit(d: int) -> None:
    x = random(20_000, d)
    found = [run(x, d, deterministic=True)[0].tril() for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("precision", ["default", "high"])
def test_error_of_a_long_stream(precision: Any) -> None:
    x = random(524_288, 256)
    check(run(x, 256, precision=precision), x, ALLOWED[precision])


def test_strided_rows_and_several_inputs() -> None:
    wide = random(6000, 1200)
    x = wide[::2, 8:584]
    parts = [x[:1000], x[1000:1001], x[1001:]]
    check(run(parts, 576), x)
    many = [random(n, 576) for n in range(1, 40)]
    check(run(many, 576), torch.cat(many))


def test_earlier_sums_are_added_to() -> None:
    x = random(3000, 640)
    c, absmax, count = run(x, 640)
    with use_backend("sm90"):
        syrk_(c, x, alpha=-1.0, absmax=absmax, outlier_count=count, outlier_threshold=THRESHOLD)
    assert float(c.tril().abs().max()) <= 1e-3
    assert torch.equal(count, 2 * (x.abs() > THRESHOLD).sum(0))


def test_elements_past_2_to_the_31() -> None:
    n, d = (1 << 31) // 4096 + 20_000, 4096
    x = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    x[-20_000:] = random(20_000, d)
    c, absmax, count = run(x, d)
    check((c, absmax, count), x[-20_000:])


def test_nan_reaches_the_diagonal_and_no_statistic() -> None:
    x = random(4096, 640)
    x[77, 300] = torch.nan
    c, absmax, count = run(x, 640)
    assert torch.isnan(c.diagonal()).nonzero().flatten().tolist() == [300]
    assert torch.equal(absmax, x.abs().nan_to_num(0).amax(0).float())
    assert torch.equal(count, (x.abs() > THRESHOLD).sum(0))


@pytest.mark.parametrize("stream", [False, True])
def test_the_current_stream_is_used(stream: bool) -> None:
    side = torch.cuda.Stream() if stream else torch.cuda.current_stream()
    x = random(4096, 1024)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        x.mul_(2)  # seen only if the kernel waits for it
        found = run(x, 1024)
    side.synchronize()
    check(found, x)


def test_what_the_kernel_does_not_take_goes_elsewhere() -> None:
    for x in (random(500, 64, torch.float32), random(500, 72)[:, 1:65]):
        check(run(x, 64), x)
