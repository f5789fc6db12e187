"""Streaming SYRK with fused outlier statistics in CUDA C++, for compute capability 9.0 alone.

`csrc/syrk_sm90.cuh` has the kernel. NVRTC compiles it at its first use, and the code is kept beside
CuPy's: CuPy itself cannot compile for sm_90a, whose instructions the kernel is made of. A call is
made ready once, its tensor maps encoded and its work shared out, and can then be repeated.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corda_kernels.errors import BackendError, first_line
from corda_kernels.files import write_bytes
from corda_kernels.kernels.cuda import sources
from corda_kernels.kernels.shares import divided

# As in csrc/syrk_sm90.cuh.
_TILE, _STEP, _THREADS, _INPUTS = 256, 64, 384, 16
_SHARED_BYTES = 1024 + 4 * 49_152 + 4 * 8_192 + 2 * 4 * 8
# Tokens in one accumulator: the bias of the tensor cores grows with it.
_LONGEST_CHAIN = {"default": 8192, "high": 2048}
# Tokens that take as long as adding a tile to C: an estimate, no GPU has measured it yet.
_EPILOGUE = 450
_TYPES = {torch.bfloat16, torch.float16}
# CUtensorMapDataType in cuda.h.
_ELEMENTS = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_SWIZZLE_128_BYTES, _L2_PROMOTION_256_BYTES = 3, 3


class Launch(ctypes.Structure):
    """The kernel's only argument: Launch in csrc/syrk_sm90.cuh."""

    _fields_ = (
        ("c", ctypes.c_ubyte * 128),
        ("x", ctypes.c_ubyte * 128 * _INPUTS),
        ("first", ctypes.c_int * _INPUTS),
        ("absmax", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("channels", ctypes.c_int),
        *((name, ctypes.c_int) for name in ("tiles", "whole", "pieces", "chain", "part")),
        *((name, ctypes.c_int) for name in ("tokens", "origin", "units")),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_uint),
    )


class Matrix(NamedTuple):
    """Where a matrix lies: address, shape and strides in elements."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def describable(self) -> bool:
        """Whether a tensor map can describe it: rows that start at multiples of 16 bytes."""
        row_bytes = self.strides[0] * self.dtype.itemsize
        aligned = self.pointer % 16 == row_bytes % 16 == 0
        return self.strides[1] == 1 and self.strides[0] > 0 and aligned


@functools.cache
def unavailable() -> str | None:
    """Why this kernel cannot run here; None where it can, which compiles it."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"compute capability 9.0 is needed, the device has {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'corda_kernels[cuda]'"
    try:
        _functions(torch.cuda.current_device())
    except Exception as error:  # CuPy's and the driver's, of many kinds
        return f"the kernel for sm_90a cannot be loaded: {first_line(error)}"
    return None


def syrk_(
    c: Tensor,  # (d, d) float32
    inputs: Sequence[Tensor],  # (n, d) each
    alpha: float,
    absmax: Tensor | None,  # (d,)
    outlier_count: Tensor | None,  # (d,)
    outlier_threshold: float,
    precision: str,
    deterministic: bool,
) -> Callable[[], None] | None:
    """c += alpha·xᵀx of all inputs in one launch, with channel statistics. See `kernels.syrk_`.

    Several programs add to a tile of C in the order in which they end. If `deterministic`, there is
    a launch for each chain of tokens instead, in which each tile is one program's.

    Returns:
        What does the same again, as long as the tensors are where they are. None if the kernel does
        not take them and nothing has been done: it takes 16-bit inputs of one dtype whose rows
        start at multiples of 16 bytes.
    """
    total, *xs = (Matrix(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (c, *inputs))
    kinds = {x.dtype for x in xs}
    if len(kinds) > 1 or not kinds <= _TYPES or not all(x.describable() for x in (total, *xs)):
        return None
    launches = _launches(
        c.get_device(),
        total,
        xs,
        (alpha, _twice(outlier_threshold, xs[0].dtype)),
        [None if t is None else t.data_ptr() for t in (absmax, outlier_count)],
        _LONGEST_CHAIN[precision],
        deterministic,
    )
    again = functools.partial(_submit, c.device, launches)
    again()
    return again


def _launches(
    device: int,
    total: Matrix,
    xs: Sequence[Matrix],
    numbers: tuple[float, int],  # alpha and the threshold's bits
    statistics: Sequence[int | None],  # addresses of absmax and count
    longest: int,
    deterministic: bool,
) -> list[tuple[int, int, Any, Launch]]:
    """What each launch of a call consists of: the function, the number of clusters, its arguments,
    and what these point to."""
    d, dtype = total.shape[1], xs[0].dtype
    name = _name(dtype) + ("_statistics" if any(statistics) else "")
    function = _functions(device)[name].ptr
    clusters = _multiprocessors(device) // 2
    rows = math.ceil(d / _TILE)
    made = []
    for index in range(0, len(xs), _INPUTS):
        some = xs[index : index + _INPUTS]
        *first, tokens = itertools.accumulate(
            (math.ceil(x.shape[0] / _STEP) * _STEP for x in some), initial=0
        )
        step = longest if deterministic else tokens
        for origin in range(0, tokens, step):
            launch = _aligned_launch()
            _encode(launch.c, total, 32)
            for place, x in zip(launch.x, some, strict=False):
                _encode(place, x, 64)
            launch.first[:] = first + [2**31 - 1] * (_INPUTS - len(first))
            launch.absmax, launch.count = statistics
            launch.channels = d
            launch.tokens, launch.origin = min(step, tokens - origin), origin
            busy = 0 if deterministic else clusters
            tiles = rows * (rows + 1) // 2
            shares = divided(launch.tokens, tiles, _STEP, longest, busy, _EPILOGUE)
            for field, value in zip(shares._fields, shares, strict=True):
                setattr(launch, field, value)
            launch.units = shares.programs(launch.tokens)
            launch.alpha, launch.limit = numbers
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(launch))
            made.append((function, min(clusters, launch.units), arguments, launch))
    return made


def _aligned_launch() -> Launch:
    """Zeros at a multiple of 64 bytes, as the driver wants tensor maps, and followed by some."""
    memory = ctypes.create_string_buffer(ctypes.sizeof(Launch) + 128)
    return Launch.from_buffer(memory, -ctypes.addressof(memory) % 64)


@functools.cache
def _twice(threshold: float, dtype: torch.dtype) -> int:
    """The threshold rounded to 16 bits, in both halves of 32."""
    bits = int(torch.tensor(threshold, dtype=dtype).view(torch.int16)) & 0xFFFF
    return bits | bits << 16


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(code: int, called: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise BackendError(f"{called}: CUDA error {code}, {(text.value or b'unknown').decode()}")


def _encode(place: Any, matrix: Matrix, box_columns: int) -> None:
    """Writes the tensor map of a matrix, with boxes of 64 rows and 128 bytes."""
    rows, columns = matrix.shape
    code = _driver().cuTensorMapEncodeTiled(
        place,
        ctypes.c_int(_ELEMENTS[matrix.dtype]),
        ctypes.c_uint32(2),
        ctypes.c_void_p(matrix.pointer),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(matrix.strides[0] * matrix.dtype.itemsize),
        (ctypes.c_uint32 * 2)(box_columns, 64),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),  # channels are not interleaved
        ctypes.c_int(_SWIZZLE_128_BYTES),
        ctypes.c_int(_L2_PROMOTION_256_BYTES),
        ctypes.c_int(0),  # zeros outside
    )
    _checked(code, "cuTensorMapEncodeTiled")


def _submit(device: torch.device, launches: Sequence[tuple[int, int, Any, Launch]]) -> None:
    """Launches on the current stream of the device, without waiting for it."""
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        for function, clusters, arguments, _ in launches:
            code = _driver().cuLaunchKernel(
                *(ctypes.c_void_p(function), 2 * clusters, 1, 1, _THREADS, 1, 1),
                *(_SHARED_BYTES, stream, arguments, None),
            )
            if code:
                _checked(code, "cuLaunchKernel")


@functools.cache
def _functions(device: int) -> dict[str, Any]:
    """Every kernel by name, as CuPy's Function, loaded on a device."""
    if device < 0:
        raise BackendError("the backend sm90 needs tensors on a GPU, these are on a CPU")
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(path=str(_compiled()))
        kernels = {}
        for dtype in _TYPES:
            for name in (_name(dtype), f"{_name(dtype)}_statistics"):
                kernel = module.get_function(name)
                kernel.max_dynamic_shared_size_bytes = _SHARED_BYTES
                kernels[name] = kernel.kernel
    return kernels


def _name(dtype: torch.dtype) -> str:
    return f"syrk_{str(dtype).removeprefix('torch.')}"


def _compiled() -> Path:
    """The file with the machine code, named by NVRTC's version and the digest of the sources."""
    from cupy.cuda import nvrtc

    folder = sources()
    files = [folder / name for name in ("syrk_sm90.cu", "syrk_sm90.cuh", "hopper.cuh")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    version = "_".join(map(str, nvrtc.getVersion()))
    cache = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    path = cache / f"corda_syrk_sm90_{version}_{digest}.cubin"
    if path.exists():
        return path
    program = nvrtc.createProgram(files[0].read_text(encoding="utf-8"), files[0].name, (), ())
    try:
        nvrtc.compileProgram(program, ("-arch=sm_90a", "-std=c++17", f"-I{folder}"))
    except Exception as error:
        raise BackendError(f"{error}: {nvrtc.getProgramLog(program)}") from error
    cache.mkdir(parents=True, exist_ok=True)
    # CuPy cuts the last byte off, as of a string; in an ELF file it is a zero that counts.
    write_bytes(path, nvrtc.getCUBIN(program) + b"\0")
    return path
