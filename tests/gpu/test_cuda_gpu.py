"""The CUDA kernels of csrc/ on a GPU, against float64 on the CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from corda_kernels.kernels import (
    available_backends,
    batched_svd,
    cuda,
    use_backend,
)
from corda_kernels.kernels.cuda import jacobi_svd, svd_shared_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.float64]
SIZES = [2, 3, 7, 16, 31, 32, 33, 64, 65, 96, 127, 128, 143, 160, 169, 192, 202, 224]


@pytest.fixture(autouse=True)
def _available() -> None:
    reason = available_backends()["cuda"]
    if reason is not None and "CuPy is not installed" in reason:
        pytest.skip(reason)
    assert reason is None


@functools.cache
def matrices(l: int) -> Tensor:
    """Float64: plain, graded to 1e-12, two clusters, rank-deficient, zero, and with zero rows."""
    generator = torch.Generator().manual_seed(l)
    plain = torch.randn(6, l, l, dtype=torch.float64, generator=generator)
    left, right = torch.linalg.qr(plain).Q, torch.linalg.qr(plain.flip(0)).Q
    half = torch.arange(l) < (l + 1) // 2
    graded = left[1] * torch.logspace(0, -12, l, dtype=torch.float64) @ right[1]
    clustered = left[2] * torch.where(half, 1.0, 1e-6) @ right[2]
    deficient = left[3] * half.double() @ right[3]
    rows = plain[5] * (~half)[:, None]
    return torch.stack([plain[0], graded, clustered, deficient, torch.zeros(l, l), rows])


def fits(l: int, dtype: torch.dtype) -> bool:
    limit = cuda.shared_memory(torch.device("cuda", torch.cuda.current_device()))
    return svd_shared_bytes(l, dtype) <= limit and l <= cuda._SVD_ROWS[dtype]


def check(t: Tensor, U: Tensor, S: Tensor, allowed: float) -> None:
    """U and S of t (b, l, l), all in float64 on the CPU."""
    exact = torch.linalg.svdvals(t)
    scale = exact[:, :1].clamp_min(1e-300)
    assert bool((S.diff() <= 0).all())
    assert float(((S - exact) / scale).abs().max()) <= allowed
    assert float((U.mT @ U - torch.eye(t.shape[-1])).abs().max()) <= allowed
    rows = U.mT @ (t / scale[..., None])
    squares = torch.diag_embed((S / scale).square())
    assert float((rows @ rows.mT - squares).abs().max()) <= 2 * allowed


@pytest.mark.parametrize("l", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jacobi_against_float64(dtype: torch.dtype, l: int) -> None:
    if not fits(l, dtype):
        pytest.skip("too large for this GPU's shared memory")
    t = matrices(l).to(dtype)
    U, S, sweeps = jacobi_svd(t.cuda())
    assert 1 <= int(sweeps.min()) <= int(sweeps.max()) <= 20
    check(t.double(), U.double().cpu(), S.double().cpu(), torch.finfo(dtype).eps * max(l, 16))


@pytest.mark.parametrize("l", [64, 203, 240, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_does_not_fit_falls_to_the_gram_matrix(dtype: torch.dtype, l: int) -> None:
    t = matrices(l).to(dtype)
    with use_backend("cuda"):
        U, S = batched_svd(t.cuda())
    assert U.dtype == S.dtype == dtype
    allowed = max(1e-7, torch.finfo(dtype).eps * l)
    check(t.double(), U.double().cpu(), S.double().cpu(), allowed)


def test_batches_of_thousands_and_of_none() -> None:
    t = torch.randn(5000, 24, 24, device="cuda")
    with use_backend("cuda"):
        U, S = batched_svd(t)
        check(t.double().cpu(), U.double().cpu(), S.double().cpu(), 1e-5)
        for shape in ((0, 8, 8), (2, 0, 8, 8), (3, 0, 0)):
            U, S = batched_svd(torch.zeros(shape, device="cuda"))
            assert (U.shape, S.shape) == (shape, shape[:-1])


def test_what_is_not_finite_is_nan_and_touches_no_other() -> None:
    t = torch.randn(3, 40, 40, device="cuda")
    alone = batched_svd(t)
    t[1, 3, 5] = torch.nan
    with use_backend("cuda"):
        for found, expected in zip(batched_svd(t), alone, strict=True):
            assert bool(found[1].isnan().all())
            assert torch.equal(found[::2], expected[::2])


def test_work_is_ordered_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    source = torch.randn(64, 100, 100, device="cuda")
    t = torch.zeros_like(source)
    torch.cuda.synchronize()
    with use_backend("cuda"):
        expected = batched_svd(source)[1]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            t.copy_(source)
            found = batched_svd(t)[1] * 1
        stream.synchronize()
    assert torch.equal(found, expected)


def test_runs_are_equal_bit_for_bit() -> None:
    t = torch.randn(200, 130, 130, device="cuda")
    with use_backend("cuda"):
        first, second = batched_svd(t), batched_svd(t)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
