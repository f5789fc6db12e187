"""The CUDA kernels of csrc/: SVDs of many small matrices, each in the shared memory of one block.

NVRTC compiles them through CuPy at their first use, and CuPy keeps the code in its cache on disk.
They take raw pointers, on torch's current stream: nothing here links to torch. What does not fit
into shared memory is left to the reference.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corda_kernels.errors import BackendError, first_line
from corda_kernels.kernels import reference

_LEAST_CAPABILITY = (8, 0)
_WARP = 32
# Bounds of the kernels themselves: threads of a block, and sizes whose columns the registers hold.
_SVD_THREADS = {torch.float32: 1024, torch.float64: 768}
_SVD_ROWS = {torch.float32: 256, torch.float64: 192}
# 7 to 9 are usual; a matrix that needs more than this many holds something else than numbers.
_MAX_SWEEPS = 40


def batched_svd(
    t: Tensor,  # (b, l, l)
    exact: bool,
) -> tuple[Tensor, Tensor]:  # (b, l, l), (b, l)
    """U and S by one-sided Jacobi. See `kernels.batched_svd`."""
    l = t.shape[-1]
    fits = svd_shared_bytes(l, t.dtype) <= shared_memory(t.device)
    if not fits or l > _SVD_ROWS[t.dtype]:
        return reference.batched_svd(t, exact)
    U, S, _ = jacobi_svd(t)
    return U, S


def jacobi_svd(
    t: Tensor,  # (b, l, l)
    max_sweeps: int = _MAX_SWEEPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and, for each matrix, the sweeps that it took.

    A count of -1 marks a matrix that holds NaN or Inf, one of -2 a matrix that did not converge; U
    and S of either are NaN.
    """
    t = t.contiguous()
    b, l, _ = t.shape
    U, S = torch.empty_like(t), t.new_empty(b, l)
    sweeps = torch.empty(b, dtype=torch.int32, device=t.device)
    if t.numel():
        pairs = (l + 1) // 2
        # As many warps as share the pairs of a round evenly: 85 pairs take 4 times 22 warps.
        turns = math.ceil(pairs * _WARP / _SVD_THREADS[t.dtype])
        launch(
            f"jacobi_svd_{_suffix(t.dtype)}",
            b,
            _WARP * math.ceil(pairs / turns),
            svd_shared_bytes(l, t.dtype),
            (t, U, S, sweeps),
            (l, max_sweeps),
        )
    return U, S, sweeps


def svd_shared_bytes(l: int, dtype: torch.dtype) -> int:
    """Shared memory for one matrix: SvdMemory in csrc/jacobi_svd.cuh."""
    numbers, indices = l * l + l + _WARP, 2 * l
    return numbers * dtype.itemsize + indices * torch.int32.itemsize


def _suffix(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def unavailable() -> str | None:
    """Why these kernels cannot run here; None where they can, which compiles them."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (_LEAST_CAPABILITY, capability))
        return f"compute capability {needed} is needed, the device has {found}"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'corda_kernels[cuda]'"
    try:
        _load(torch.cuda.current_device())
    except BackendError as error:
        return str(error)
    return None


def launch(
    name: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    """Launches one kernel on the current stream of the tensors' device, without waiting for it.

    Args:
        name: of the kernel in kernels.cu.
        blocks: size of the grid, at least 1.
        threads: of a block, a multiple of 32.
        shared_bytes: dynamic shared memory of a block.
        tensors: the kernel's pointers, contiguous, on one device.
        numbers: its int arguments after them.

    Raises:
        BackendError: the tensors are not on a GPU, or the kernels cannot be loaded for it.
    """
    import cupy

    device = _gpu(tensors[0].device)
    # CuPy passes Python's own integers as 64 bits, the kernels take int.
    arguments = [tensor.data_ptr() for tensor in tensors] + [np.int32(value) for value in numbers]
    stream = cupy.cuda.Stream.from_external(_Stream(device))
    with cupy.cuda.Device(device.index), stream:
        kernel = _load(device.index)[name]
        kernel((blocks,), (threads,), tuple(arguments), shared_mem=shared_bytes)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have, at most.

    Raises:
        BackendError: it is not a GPU.
    """
    import cupy

    runtime = cupy.cuda.runtime
    limit = runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin
    return int(runtime.deviceGetAttribute(limit, _gpu(device).index))


def _gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        raise BackendError(
            f"the backend cuda needs tensors on a GPU, these are on {device}: move them, or "
            'call it in `with use_backend("reference"):`'
        )
    return device


class _Stream:
    """torch's current stream under the protocol by which CuPy takes streams of others."""

    def __init__(self, device: torch.device) -> None:
        self._address = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def sources() -> Path:
    """The folder of the CUDA sources: inside the installed package, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


@functools.cache
def _load(index: int) -> dict[str, Any]:
    """Every kernel by name, ready to launch on a device.

    Raises:
        BackendError: CuPy, the sources or NVRTC are missing, or NVRTC does not compile them.
    """
    try:
        import cupy
    except Exception as error:  # a broken installation raises more than ImportError
        raise BackendError(f"CuPy cannot be loaded: {first_line(error)}") from error
    folder = sources()
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.cu*"))}
    if "kernels.cu" not in files:
        raise BackendError(f"the CUDA sources are missing, {folder}: install the package again")
    # CuPy's cache does not see what is included: the digest makes a change there a new entry.
    digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:15]
    options = ("-std=c++17", f"-I{folder}", f"-DCORDA_SOURCES=0x{digest}")
    with cupy.cuda.Device(index):
        try:
            module = cupy.RawModule(code=files["kernels.cu"].decode(), options=options)
            names = [f"jacobi_svd_{_suffix(dtype)}" for dtype in _SVD_THREADS]
            kernels = {name: module.get_function(name) for name in names}
            for kernel in kernels.values():
                kernel.max_dynamic_shared_size_bytes = shared_memory(torch.device("cuda", index))
        except Exception as error:  # CuPy's: no NVRTC, or what the compiler says
            says = f"NVRTC does not compile the CUDA kernels: {first_line(error)}"
            raise BackendError(says) from error
    return kernels
