"""Loads the kernels of csrc/ through CuPy and launches them on torch's current stream.

The fatbin of the installation is taken where it was built from these very sources and has code for
the device. Otherwise NVRTC compiles them, into CuPy's cache on disk. Nothing here links to torch:
the kernels take raw pointers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corda_kernels.errors import BackendError
from corda_kernels.kernels import fatbin

_LEAST_CAPABILITY = (8, 0)
_KERNELS = (
    "jacobi_svd_float32",
    "jacobi_svd_float64",
    "damped_cholesky_float32",
    "damped_cholesky_float64",
)


def sources() -> Path:
    """The folder of the CUDA sources: inside the installed package, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def unavailable() -> str | None:
    """Why these kernels cannot run here; None where they can, which loads them."""
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
            'use_backend("reference")'
        )
    return device


class _Stream:
    """torch's current stream under the protocol by which CuPy takes streams of others."""

    def __init__(self, device: torch.device) -> None:
        self._address = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


@functools.cache
def _load(index: int) -> dict[str, Any]:
    """Every kernel by name, ready to launch on a device.

    Raises:
        BackendError: neither the fatbin nor NVRTC yields them; the message says why for both.
    """
    try:
        import cupy
    except Exception as error:  # a broken installation raises more than ImportError
        raise BackendError(f"CuPy cannot be loaded: {_first_line(error)}") from error
    folder = sources()
    if not folder.is_dir():
        raise BackendError(f"the CUDA sources are missing, {folder}: install the package again")
    with cupy.cuda.Device(index):
        reason = fatbin.unusable(folder, torch.cuda.get_device_capability(index))
        if reason is None:
            try:
                return _kernels(cupy.RawModule(path=str(folder / fatbin.FATBIN)), index)
            except Exception as error:  # the driver's: too old, for example
                reason = f"the fatbin does not load ({_first_line(error)})"
        try:
            return _kernels(_compiled(folder), index)
        except Exception as error:  # CuPy's: no NVRTC, or what the compiler says
            raise BackendError(
                f"{reason}, and NVRTC does not compile the kernels either: {_first_line(error)}"
            ) from error


def _compiled(folder: Path) -> Any:
    """A module that CuPy compiles at its first use, or finds in its cache."""
    import cupy

    # CuPy's cache does not see what is included: the digest makes a change there a new entry.
    options = (*fatbin.OPTIONS, f"-I{folder}", f"-DCORDA_SOURCES=0x{fatbin.digest(folder)[:15]}")
    code = folder.joinpath("kernels.cu").read_text(encoding="utf-8")
    return cupy.RawModule(code=code, options=options)


def _kernels(module: Any, index: int) -> dict[str, Any]:
    found = {name: module.get_function(name) for name in _KERNELS}
    for kernel in found.values():
        kernel.max_dynamic_shared_size_bytes = shared_memory(torch.device("cuda", index))
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
