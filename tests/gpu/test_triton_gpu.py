"""The Triton kernels on a GPU: precision of the tensor cores, bfloat16, and large indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import gram
from pairs import pairwise
from torch import Tensor

from corda_kernels.kernels import available_backends, syrk_, use_backend

pytest.importorskip("triton", minversion="3.6")
from corda_kernels.kernels import triton_syrk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Relative Frobenius error allowed to the truncation of the tensor cores, by precision.
ALLOWED = {"default": 5e-5, "high": 1e-5}


def random(n: int, d: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(n, d, device="cuda", generator=generator).to(dtype)


def run(x: Any, d: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    c = torch.zeros(d, d, device="cuda")
    absmax = torch.zeros(d, device="cuda")
    count = torch.zeros(d, dtype=torch.int64, device="cuda")
    with use_backend("triton"):
        syrk_(c, x, absmax=absmax, outlier_count=count, outlier_threshold=1.5, **options)
    return c, absmax, count


def error(c: Tensor, exact: Tensor) -> float:
    return float((c.double().tril() - exact.tril()).norm() / exact.tril().norm())


def test_the_backend_is_available() -> None:
    assert available_backends()["triton"] is None


@pairwise(n=[1, 100, 5000, 8192], d=[1, 33, 250, 576, 1536, 4096], dtype=DTYPES)
def test_results_on_ragged_and_even_shapes(n: int, d: int, dtype: torch.dtype) -> None:
    x = random(n, d, dtype)
    c, absmax, count = run(x, d)
    assert error(c, gram(x)) <= ALLOWED["default"]
    assert torch.equal(absmax, x.abs().amax(0).float())
    assert torch.equal(count, (x.abs() > 1.5).sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["default", "high"])
def test_error_of_a_long_stream(precision: Any, dtype: torch.dtype) -> None:
    x = random(524_288, 256, dtype)
    assert error(run(x, 256, precision=precision)[0], gram(x)) <= ALLOWED[precision]


def test_error_does_not_grow_with_the_number_of_calls() -> None:
    x = random(131_072, 512, torch.bfloat16)
    c = torch.zeros(512, 512, device="cuda")
    with use_backend("triton"):
        for chunk in torch.split(x, 2048):
            syrk_(c, chunk)
    assert error(c, gram(x)) <= ALLOWED["default"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_runs_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    x = random(20_000, 600, dtype)
    first, second = (run(x, 600, deterministic=True)[0].tril() for _ in range(2))
    assert torch.equal(first, second)
    assert error(first, gram(x)) <= ALLOWED["default"]


@pytest.mark.parametrize("runs", [0, 2, 5])
@pytest.mark.parametrize("turned", [False, True])
def test_the_turned_tile_and_programs_that_only_read(turned: bool, runs: int) -> None:
    tile = triton_syrk.TMA_TURNED if turned else triton_syrk.TMA_WIDE
    for n, d in ((300, 256), (5000, 1000), (20_000, 2048)):
        x = random(n, d, torch.bfloat16)
        c, absmax = torch.zeros(d, d, device="cuda"), torch.zeros(d, device="cuda")
        count = torch.zeros(d, dtype=torch.int64, device="cuda")
        options = 1.0, absmax, count, 1.5, "default", False
        triton_syrk.syrk_(c, x, *options, tile=tile, runs=runs)
        assert error(c, gram(x)) <= ALLOWED["default"]
        assert torch.equal(absmax, x.abs().amax(0).float())
        assert torch.equal(count, (x.abs() > 1.5).sum(0))


def test_strided_rows_and_several_inputs() -> None:
    wide = random(6000, 1200, torch.bfloat16)
    x = wide[::2, 7:583]
    parts = [x[:1000], x[1000:1001], x[1001:]]
    c, absmax, _ = run(parts, 576)
    assert error(c, gram(x)) <= ALLOWED["default"]
    assert torch.equal(absmax, x.abs().amax(0).float())


def test_elements_past_2_to_the_31() -> None:
    n, d = (1 << 31) // 4096 + 20_000, 4096
    x = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    x[-20_000:] = random(20_000, d, torch.bfloat16)
    c, absmax, count = run(x, d)
    tail = x[-20_000:]
    assert error(c, gram(tail)) <= ALLOWED["default"]
    assert torch.equal(absmax, tail.abs().amax(0).float())
    assert torch.equal(count, (tail.abs() > 1.5).sum(0))


def test_nan_reaches_the_diagonal() -> None:
    x = random(4096, 640, torch.bfloat16)
    x[77, 300] = torch.nan
    c, _, _ = run(x, 640)
    assert torch.isnan(c.diagonal()).nonzero().flatten().tolist() == [300]


def test_cupy_arrays_are_taken_without_a_copy() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.random.standard_normal((3000, 320), dtype=cupy.float32)
    c = cupy.zeros((320, 320), dtype=cupy.float32)
    assert syrk_(c, x) is c
    assert error(torch.from_dlpack(c), gram(torch.from_dlpack(x))) <= ALLOWED["default"]
