"""Streaming SYRK with fused outlier statistics, in Triton.

C += alpha·XᵀX on the tiles of the lower triangle. The tensor cores round toward zero inside one
accumulator, so that none runs over more than 8,192 tokens (2,048 for precision "high") before it is
added to C in float32, rounded to nearest.

Every program begins with a share of the statistics, a block of X that it reads for them: while some
read, others multiply. Tiles on the diagonal could take them on data that they have loaded anyway,
but would then take twice as long as others, which at 4096 channels costs an H100 just as much.

Two kernels: `_tiles_by_pointer` loads by cp.async and takes any row stride, `_tiles_by_tma` takes
tensor descriptors, on Hopper and later, and adds its tiles to C by bulk reductions.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from corda_kernels.errors import BackendError, ConfigError
from corda_kernels.kernels.shares import Shares, divided

# They change from call to call: for every kind of them Triton would compile anew.
_UNSPECIALIZED = ("tiles", "whole", "pieces")


@triton.jit
def _triangle(t, RATIO: tl.constexpr):
    """Row i and column j of tile t, counted along rows of RATIO·(i + 1) tiles."""
    q = t // RATIO
    i = ((tl.sqrt(8.0 * q.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The float square root may be off by one either way.
    i = tl.where(i * (i + 1) // 2 > q, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= q, i + 1, i)
    return i, t - RATIO * (i * (i + 1) // 2)


@triton.jit
def _grouped(t, rows, RATIO: tl.constexpr, GROUP: tl.constexpr):
    """Row i and column j of tile t, counted down the columns of GROUP rows at a time.

    Tiles that run at the same time then form a rectangle, and share what they load of X.
    """
    i, _ = _triangle(t, RATIO)
    above = i // GROUP * GROUP  # rows before this group
    height = tl.minimum(GROUP, rows - above)
    inside = t - RATIO * (above * (above + 1) // 2)
    full = RATIO * above * height  # tiles of the group left of its own triangle
    row, column = _triangle(tl.maximum(inside - full, 0), RATIO)
    i = above + tl.where(inside < full, inside % height, row)
    j = tl.where(inside < full, inside // height, RATIO * above + column)
    return i, j


@triton.jit
def _turned(t, rows, RATIO: tl.constexpr, GROUP: tl.constexpr):
    """The same of tiles that are RATIO times as wide as high, on squares of such."""
    row, inside = _grouped(t, rows, RATIO, GROUP)
    return RATIO * row + inside % RATIO, inside // RATIO


@triton.jit
def _share(p, tiles, whole, pieces, chain, part, n):
    """Tile of program p, its first token and the end of its tokens.

    Tokens are in spans of `chain`, and a unit is one tile on one span. The first `whole` programs
    take one each; `pieces` programs share each of the others, which would not fill the device.
    """
    beyond = tl.maximum(p - whole, 0)
    unit = tl.where(p < whole, p, whole + beyond // pieces)
    span = unit // tiles * chain
    begin = span + tl.where(p < whole, 0, beyond % pieces * part)
    end = tl.minimum(begin + tl.where(p < whole, chain, part), tl.minimum(span + chain, n))
    return unit % tiles, begin, end


@triton.jit
def _looked_at(p, programs, n, d, BN: tl.constexpr, BK: tl.constexpr):
    """Block of BN channels of which program p takes the statistics, its first token and the end of
    its tokens; there may be none."""
    blocks = tl.cdiv(d, BN)
    length = tl.cdiv(tl.cdiv(n, programs // blocks), BK) * BK
    begin = p // blocks * length
    return p % blocks, begin, tl.minimum(begin + length, n)


@triton.jit
def _fold_statistics(largest, above, absmax_ptrs, count_ptrs, kept):
    """Reduces the running maxima and counts of a block over its tokens into the channels' sums."""
    maxima = tl.max(largest.to(tl.float32), axis=0)
    counts = tl.sum(above.to(tl.int32), axis=0).to(tl.int64)
    tl.atomic_max(absmax_ptrs, maxima, mask=kept, sem="relaxed")
    tl.atomic_add(count_ptrs, counts, mask=kept, sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _tiles_by_pointer(
    x_ptr,  # (n, d), element (k, c) at k·stride + c
    c_ptr,  # (d, d) float32, row stride c_stride
    absmax_ptr,  # (d,) float32
    count_ptr,  # (d,) int64
    n,
    d,
    stride,
    c_stride,
    tiles,
    whole,  # from here to part: see _share
    pieces,
    chain,
    part,
    alpha,
    threshold,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr,
    ATOMIC: tl.constexpr,
    RAGGED: tl.constexpr,  # d is no multiple of the tile, or n of BK
):
    tokens = tl.arange(0, BK)
    step = tl.cast(stride, tl.int64) * BK  # a stride of 1 is a constant, without a .to
    if STATISTICS:
        block, begin, end = _looked_at(tl.program_id(0), tl.num_programs(0), n, d, BN, BK)
        columns = block * BN + tl.arange(0, BN)
        origin = x_ptr + tl.cast(begin, tl.int64) * stride
        ptrs = origin + tokens[:, None].to(tl.int64) * stride + columns[None, :]
        largest = tl.zeros((BK, BN), dtype=x_ptr.dtype.element_ty)
        above = tl.zeros((BK, BN), dtype=tl.int16)
        # A plain float has no .to under the interpreter.
        limit = (tl.zeros((1, 1), dtype=tl.float32) + threshold).to(x_ptr.dtype.element_ty)
        for k in range(begin, end, BK):
            inside = (k + tokens < end)[:, None] & (columns < d)[None, :]
            magnitude = tl.abs(tl.load(ptrs, mask=inside, other=0.0))
            largest = tl.maximum(largest, magnitude).to(x_ptr.dtype.element_ty)
            above += (magnitude > limit).to(tl.int16)
            ptrs += step
        if begin < end:
            _fold_statistics(largest, above, absmax_ptr + columns, count_ptr + columns, columns < d)
    t, begin, end = _share(tl.program_id(0), tiles, whole, pieces, chain, part, n)
    i, j = _grouped(t, tl.cdiv(d, BM), BM // BN, GROUP)
    rows = i * BM + tl.arange(0, BM)
    columns = j * BN + tl.arange(0, BN)
    origin = x_ptr + tl.cast(begin, tl.int64) * stride
    # Xᵀ by transposed addresses: a transposition after the load would leave the async pipeline.
    a_ptrs = origin + tokens[None, :].to(tl.int64) * stride + rows[:, None]
    b_ptrs = origin + tokens[:, None].to(tl.int64) * stride + columns[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(begin, end, BK):
        if RAGGED:
            inside = k + tokens < end
            a = tl.load(a_ptrs, mask=inside[None, :] & (rows < d)[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None] & (columns < d)[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += step
        b_ptrs += step
    acc *= alpha
    c_ptrs = c_ptr + rows[:, None].to(tl.int64) * c_stride + columns[None, :]
    kept = (rows < d)[:, None] & (columns < d)[None, :]
    if ATOMIC:
        tl.atomic_add(c_ptrs, acc, mask=kept, sem="relaxed")
    else:
        tl.store(c_ptrs, tl.load(c_ptrs, mask=kept, other=0.0) + acc, mask=kept)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _tiles_by_tma(
    a_desc,  # descriptor of X (n, d) with blocks (BK, BM)
    b_desc,  # descriptor of X (n, d) with blocks (BK, BN)
    c_desc,  # descriptor of C (d, d) with blocks (BM, BN)
    absmax_ptr,
    count_ptr,
    n,
    d,
    tiles,
    whole,  # from here to part: see _share
    pieces,
    chain,
    part,
    alpha,
    threshold,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    STATISTICS: tl.constexpr,
    DTYPE: tl.constexpr,
    RUNS: tl.constexpr,  # see `syrk_`
):
    p = tl.program_id(0)
    if STATISTICS:
        readers = tl.num_programs(0) if RUNS == 0 else tl.cdiv(d, BN) * RUNS
        block, begin, end = _looked_at(p, readers, n, d, BN, BK)
        largest = tl.zeros((BK, BN), dtype=DTYPE)
        above = tl.zeros((BK, BN), dtype=tl.int16)
        limit = (tl.zeros((1, 1), dtype=tl.float32) + threshold).to(DTYPE)
        for k in range(begin, end, BK):
            magnitude = tl.abs(b_desc.load([k, block * BN]))
            largest = tl.maximum(largest, magnitude).to(DTYPE)
            above += (magnitude > limit).to(tl.int16)
        if begin < end:
            columns = block * BN + tl.arange(0, BN)
            _fold_statistics(largest, above, absmax_ptr + columns, count_ptr + columns, columns < d)
        if RUNS > 0:
            if p < readers:
                return
            p -= readers
    t, begin, end = _share(p, tiles, whole, pieces, chain, part, n)
    if BM < BN:
        i, j = _turned(t, tl.cdiv(d, BN), BN // BM, GROUP)
    else:
        i, j = _grouped(t, tl.cdiv(d, BM), BM // BN, GROUP)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(begin, end, BK):
        a = a_desc.load([k, i * BM])
        b = b_desc.load([k, j * BN])
        acc = tl.dot(tl.trans(a), b, acc)
    acc *= alpha
    c_desc.atomic_add([i * BM, j * BN], acc)


class Tile(NamedTuple):
    """One configuration: rows, columns and tokens of a step, warps and pipeline stages."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# Every row compiles without spills for its architectures under Triton 3.6, 3.7.1 and 3.9.
TMA_WIDE = Tile(256, 128, 64, 8, 4)  # the most products for each load that the registers hold
TMA_TURNED = Tile(128, 256, 64, 8, 4)  # the same turned: chosen by nobody yet, no GPU has run it
TMA = Tile(128, 128, 64, 4, 4)  # more and smaller tiles, where there are few
POINTER = Tile(128, 128, 32, 8, 4)  # with four warps the statistics would spill
POINTER_UNALIGNED = Tile(64, 64, 32, 4, 3)  # an address for each element takes many registers
POINTER_FLOAT32 = Tile(128, 64, 32, 8, 3)  # the three products of a step need the registers
INTERPRETED = Tile(64, 32, 32, 4, 1)  # so small that small inputs still have several tiles

_WIDE_CHANNELS = 2048
# Rows of tiles that are visited together, see _grouped. On an H100 all together are best up to
# 8,192 channels, four at a time past that.
_GROUP = 4
_GROUPED_CHANNELS = 8192
# Tokens in one accumulator: the bias of the tensor cores grows with it.
_LONGEST_CHAIN = {"default": 8192, "high": 2048}
# Tokens that take as long as adding a tile to C.
_EPILOGUE = 900
_NEEDED = (3, 6)
_TYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FLOAT32_PRODUCT = {"default": "bf16x3", "high": "tf32x3"}


def unavailable() -> str | None:
    """Why these kernels cannot run here; None where they can."""
    version = triton.__version__
    if tuple(map(int, version.split(".")[:2])) < _NEEDED:
        return f"triton {'.'.join(map(str, _NEEDED))} is needed for bf16x3, {version} is installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (with TRITON_INTERPRET=1 a CPU interprets the kernels)"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability 8.0 is needed, the device has {capability[0]}.{capability[1]}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def syrk_(
    c: Tensor,  # (d, d) float32
    x: Tensor,  # (n, d) bf16, fp16 or fp32
    alpha: float,
    absmax: Tensor | None,  # (d,)
    outlier_count: Tensor | None,  # (d,)
    outlier_threshold: float,
    precision: str,
    deterministic: bool,
    *,
    tile: Tile | None = None,
    runs: int = 0,
) -> None:
    """c += alpha·xᵀx, lower triangle only, with channel statistics. See `kernels.syrk_`.

    Args:
        c, x, alpha, absmax, outlier_count, outlier_threshold, precision, deterministic: as there.
        tile: another one than is chosen by the width, where tensor descriptors are taken.
        runs: there programs that take nothing but statistics come first, so many a block of
            channels; with 0 every program takes a share of them.
    """
    if not (c.is_cuda or _interpreted()):
        raise BackendError(f"the backend triton needs tensors on a GPU, these are on {c.device}")
    if c.stride(1) != 1:
        raise ConfigError("the columns of c must be contiguous for the backend triton")
    if x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) <= 0):
        x = x.contiguous()
    d = x.shape[1]
    by_tma, chosen = _choose(c, x)
    tile = tile if by_tma and tile is not None else chosen
    BM, BN, BK, warps, stages = tile
    longest = _LONGEST_CHAIN[precision]
    processors = 0 if deterministic else _processors(c.device)
    statistics = absmax is not None or outlier_count is not None
    largest = absmax if absmax is not None else c.new_zeros(d)
    above = outlier_count if outlier_count is not None else _no_counts(d, c.device)
    limit = _rounded(outlier_threshold, x.dtype)
    constants = {"BM": BM, "BN": BN, "BK": BK, "GROUP": _group(d), "STATISTICS": statistics}
    options = {"num_warps": warps, "num_stages": stages}
    # One program a tile adds in the order of launches, several in the order of their ends.
    step = longest if deterministic else x.shape[0]
    with torch.cuda.device(c.device) if c.is_cuda else torch.no_grad():
        for rows in torch.split(x, step):
            n = rows.shape[0]
            shares = _divided(n, d, tile, longest, processors)
            programs = shares.programs(n)
            if by_tma:
                readers = runs * triton.cdiv(d, BN) if statistics else 0
                a = TensorDescriptor.from_tensor(rows, [BK, BM])
                b = a if BM == BN else TensorDescriptor.from_tensor(rows, [BK, BN])
                _tiles_by_tma[(readers + programs,)](
                    *(a, b),
                    TensorDescriptor.from_tensor(c, [BM, BN]),
                    *(largest, above, n, d, *shares, alpha, limit),
                    DTYPE=_TYPES[x.dtype],
                    RUNS=runs,
                    **constants,
                    **options,
                )
                continue
            product = _FLOAT32_PRODUCT[precision] if x.dtype == torch.float32 else "ieee"
            _tiles_by_pointer[(programs,)](
                *(rows, c, largest, above, n, d, rows.stride(0), c.stride(0)),
                *(*shares, alpha, limit),
                PRECISION="ieee" if _interpreted() else product,
                ATOMIC=programs > shares.tiles,
                RAGGED=d % BM != 0 or n % BK != 0,
                **constants,
                **options,
            )


def _choose(c: Tensor, x: Tensor) -> tuple[bool, Tile]:
    """Whether to load by TMA, and the tile."""
    if _interpreted():
        return False, INTERPRETED
    if x.dtype == torch.float32:
        return False, POINTER_FLOAT32
    capability = torch.cuda.get_device_capability(c.device)
    if capability >= (9, 0) and _describable(x) and _describable(c):
        return True, TMA_WIDE if x.shape[1] >= _WIDE_CHANNELS else TMA
    # Triton loads 16 bytes at a time where it knows that width, stride and address allow it.
    vectors = all(value % 16 == 0 for value in (x.shape[1], x.stride(0), x.data_ptr()))
    return False, POINTER if vectors else POINTER_UNALIGNED


def _describable(matrix: Tensor) -> bool:
    """TMA takes rows that start at multiples of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def _divided(n: int, d: int, tile: Tile, longest: int, processors: int) -> Shares:
    high, low = max(tile.BM, tile.BN), min(tile.BM, tile.BN)
    rows = triton.cdiv(d, high)
    tiles = high // low * (rows * (rows + 1) // 2)
    return divided(n, tiles, tile.BK, longest, processors, _EPILOGUE)


def _group(d: int) -> int:
    return _GROUP if d > _GROUPED_CHANNELS else _GROUPED_CHANNELS


@functools.cache
def _rounded(threshold: float, dtype: torch.dtype) -> float:
    """|x| is compared in its own dtype, as torch does."""
    return float(torch.tensor(threshold, dtype=dtype))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _no_counts(d: int, device: torch.device) -> Tensor:
    """Where counts go that nobody asked for."""
    return torch.zeros(d, dtype=torch.int64, device=device)
