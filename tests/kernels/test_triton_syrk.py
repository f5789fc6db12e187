"""The Triton kernels under the interpreter: indexing, masks and statistics, on a CPU.

The interpreter says nothing of speed and of the precision of tensor cores, and its products of
bfloat16 are wrong: those are for tests/gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_kernels import kernels
from corda_kernels.errors import ConfigError
from corda_kernels.kernels import available_backends, syrk_, use_backend

pytest.importorskip("triton", minversion="3.6")
import triton
import triton.language as tl

from corda_kernels.kernels import shares, triton_syrk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="with a GPU the kernels run there: see tests/gpu"
    ),
]

GUARD = 7.0  # outside C, where nothing may be written


def accumulator(d: int) -> tuple[Tensor, Tensor]:
    """C as a part of a larger tensor: zero below, NaN above the diagonal, a guard around it."""
    whole = torch.full((d + 40, d + 40), GUARD)
    c = whole[:d, :d]
    c.zero_()[torch.ones(d, d).triu(1).bool()] = torch.nan
    return whole, c


def check(x: Tensor | list[Tensor], tokens: Tensor, threshold: float = 1.5, **options: Any) -> None:
    """Compares the kernels on `x` with plain products of the same `tokens`."""
    d = tokens.shape[1]
    whole, c = accumulator(d)
    absmax, count = torch.zeros(d), torch.zeros(d, dtype=torch.int64)
    with use_backend("triton"):
        syrk_(c, x, absmax=absmax, outlier_count=count, outlier_threshold=threshold, **options)
    exact = (tokens.double().T @ tokens.double()).tril() * options.get("alpha", 1.0)
    scale = exact.diagonal().abs().max().clamp_min(1e-30) if d else 1.0
    assert float(((c.double().tril() - exact) / scale).abs().max()) < 1e-5
    guard = torch.ones_like(whole, dtype=torch.bool)
    guard[:d, :d] = False
    assert bool((whole[guard] == GUARD).all())
    largest = tokens.abs().amax(0).float() if len(tokens) else torch.zeros(d)
    assert torch.equal(absmax, largest)
    assert torch.equal(count, (tokens.abs() > threshold).sum(0))


def test_the_interpreter_is_a_backend() -> None:
    assert available_backends()["triton"] is None


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 300),
    d=st.integers(1, 300),
    half=st.booleans(),
    before=st.integers(0, 5),
    step=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_any_shape_and_stride(
    n: int, d: int, half: bool, before: int, step: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(n * step, before + d + 2, generator=generator)
    x = wide.to(torch.float16 if half else torch.float32)[::step, before : before + d]
    check(x, x)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["default", "high"])
def test_several_chains_add_up(precision: Any, deterministic: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(triton_syrk, "_LONGEST_CHAIN", {"default": 64, "high": 32})
    monkeypatch.setattr(shares, "_SHORTEST_PART", 16)
    x = torch.randn(210, 70)
    check(x, x, precision=precision, deterministic=deterministic)


def test_programs_share_the_tokens_where_there_are_few_tiles(monkeypatch: Any) -> None:
    monkeypatch.setattr(triton_syrk, "_processors", lambda device: 64)
    monkeypatch.setattr(shares, "_SHORTEST_PART", 16)
    x = torch.randn(150, 40)
    check(x, x, alpha=0.25)


def test_several_inputs_of_any_length() -> None:
    parts = [torch.randn(n, 50) for n in (1, 0, 33, 120)]
    check(parts, torch.cat(parts))


def test_no_rows_change_nothing() -> None:
    check(torch.zeros(0, 33), torch.zeros(0, 33))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_threshold_is_taken_in_the_dtype_of_x(threshold: float, dtype: torch.dtype) -> None:
    x = torch.randn(80, 40).to(dtype)
    x[5] = threshold
    check(x, x, threshold=threshold)


def test_channels_apart_in_memory_are_copied() -> None:
    x = torch.randn(60, 80).T
    check(x, x)


@pytest.mark.parametrize("wanted", ["absmax", "outlier_count"])
def test_either_statistic_alone(wanted: str) -> None:
    x = 4 * torch.randn(50, 35)
    _, c = accumulator(35)
    kept = torch.zeros(35, dtype=torch.float32 if wanted == "absmax" else torch.int64)
    with use_backend("triton"):
        syrk_(c, x, **{wanted: kept})
    expected = x.abs().amax(0) if wanted == "absmax" else (x.abs() > 6).sum(0)
    assert torch.equal(kept, expected)


def test_nan_reaches_the_diagonal() -> None:
    x = torch.randn(40, 20)
    x[3, 7] = torch.nan
    _, c = accumulator(20)
    with use_backend("triton"):
        syrk_(c, x, absmax=torch.zeros(20))
    assert torch.isnan(c.diagonal()).nonzero().flatten().tolist() == [7]


def test_nan_counts_in_no_statistic() -> None:
    """Under the interpreter NaN stays where it stood in a block, hence the few rows."""
    x = torch.randn(12, 40)
    x[3, 1] = torch.nan
    x[:7, 2] = torch.nan
    x[9, 1] = -9
    absmax, count = torch.zeros(40), torch.zeros(40, dtype=torch.int64)
    with use_backend("triton"):
        syrk_(accumulator(40)[1], x, absmax=absmax, outlier_count=count)
    assert torch.equal(absmax, x.abs().nan_to_num(0).amax(0))
    assert torch.equal(count, (x.abs() > 6).sum(0))


def test_a_call_is_checked_once_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check_ = kernels._check_syrk
    monkeypatch.setattr(kernels, "_check_syrk", lambda *given: checked.append(1) or check_(*given))
    monkeypatch.setattr(kernels, "_repeats", {})
    monkeypatch.setattr(kernels, "_REPEATS", 2)
    x, absmax = torch.randn(40, 20, requires_grad=True), torch.zeros(20)
    c = accumulator(20)[1]
    with use_backend("triton"):
        for _ in range(3):
            syrk_(c, x, absmax=absmax)
        assert len(checked) == 1
        exact = 3 * (x.T @ x).detach().tril()
        torch.testing.assert_close(c.tril(), exact, rtol=1e-5, atol=1e-4)
        assert torch.equal(absmax, x.detach().abs().amax(0))
        assert not c.requires_grad
        # Other calls are checked, and none is kept for ever.
        for n in (39, 38, 37):
            syrk_(c, x[:n])
        assert len(checked) == 4
        assert len(kernels._repeats) == 2
        with pytest.raises(ConfigError, match="precision must be"):
            syrk_(c, x, absmax=absmax, precision=["high"])  # type: ignore[arg-type]


def test_a_triton_that_is_too_old_is_said(monkeypatch: Any) -> None:
    assert triton_syrk.unavailable() is None
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    assert triton_syrk.unavailable() == "triton 3.6 is needed for bf16x3, 3.4.0 is installed"


def test_float64_falls_to_the_reference() -> None:
    x = torch.randn(30, 20, dtype=torch.float64)
    c = torch.zeros(20, 20, dtype=torch.float64)
    with use_backend("triton"):
        syrk_(c, x)
    torch.testing.assert_close(c.tril(), (x.T @ x).tril())


@triton.jit
def _note_tiles(found, rows, RATIO: tl.constexpr, GROUP: tl.constexpr, TURNED: tl.constexpr):
    if TURNED:
        i, j = triton_syrk._turned(tl.program_id(0), rows, RATIO, GROUP)
    else:
        i, j = triton_syrk._grouped(tl.program_id(0), rows, RATIO, GROUP)
    tl.store(found + 2 * tl.program_id(0), i)
    tl.store(found + 2 * tl.program_id(0) + 1, j)


@pytest.mark.parametrize(("ratio", "turned"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13])
def test_every_tile_of_the_triangle_is_visited_once(rows: int, ratio: int, turned: bool) -> None:
    sizes = (128, 128 * ratio) if turned else (128 * ratio, 128)
    tile = triton_syrk.Tile(*sizes, 64, 8, 3)
    tiles = triton_syrk._divided(1, rows * 128 * ratio, tile, 64, 1).tiles
    found = torch.full((tiles, 2), -1, dtype=torch.int32)
    _note_tiles[(tiles,)](found, rows, RATIO=ratio, GROUP=4, TURNED=turned)
    if turned:
        expected = {(i, j) for i in range(2 * rows) for j in range(i // 2 + 1)}
    else:
        expected = {(i, j) for i in range(rows) for j in range(ratio * (i + 1))}
    assert len(expected) == tiles
    assert set(map(tuple, found.tolist())) == expected


@triton.jit
def _note_shares(found, tiles, whole, pieces, chain, part, n):
    p = tl.program_id(0)
    t, begin, end = triton_syrk._share(p, tiles, whole, pieces, chain, part, n)
    tl.store(found + 3 * p, t)
    tl.store(found + 3 * p + 1, begin)
    tl.store(found + 3 * p + 2, end)


@triton.jit
def _note_looks(found, programs, n, d, BN: tl.constexpr, BK: tl.constexpr):
    p = tl.program_id(0)
    block, begin, end = triton_syrk._looked_at(p, programs, n, d, BN, BK)
    tl.store(found + 3 * p, block)
    tl.store(found + 3 * p + 1, begin)
    tl.store(found + 3 * p + 2, end)


@pytest.mark.parametrize("runs", [1, 2, 7])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (300, 100), (1000, 513), (64, 256)])
def test_the_first_programs_look_at_everything_once(n: int, d: int, runs: int) -> None:
    blocks = -(-d // 128)
    found = torch.full((blocks * runs + 5, 3), -1, dtype=torch.int32)
    _note_looks[(len(found),)](found, blocks * runs, n, d, BN=128, BK=64)
    seen = torch.zeros(blocks, n, dtype=torch.int32)
    for block, begin, end in found.tolist():
        seen[block, begin : max(begin, end)] += 1
    assert bool((seen == 1).all())


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 1500),
    d=st.integers(1, 1200),
    longest=st.sampled_from([128, 512]),
    processors=st.sampled_from([0, 1, 7, 30]),
)
def test_shares_cover_every_token_of_every_tile_once(
    n: int, d: int, longest: int, processors: int
) -> None:
    tile = triton_syrk.Tile(256, 128, 16, 8, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "_SHORTEST_PART", 32)
        shares.divided.cache_clear()
        made = triton_syrk._divided(n, d, tile, longest, processors)
        shares.divided.cache_clear()
    programs = made.programs(n)
    found = torch.full((programs, 3), -1, dtype=torch.int32)
    _note_shares[(programs,)](found, *made, n)
    seen = torch.zeros(made.tiles, n, dtype=torch.int32)
    for t, begin, end in found.tolist():
        assert end - begin <= longest
        seen[t, begin : max(begin, end)] += 1
    assert bool((seen == 1).all())
