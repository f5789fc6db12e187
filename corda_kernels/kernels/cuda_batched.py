"""Decompositions of many small matrices, each in the shared memory of one block of a GPU.

What does not fit there is left to the reference. The kernels and their sources: csrc/.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from corda_kernels.kernels import cuda_loader, reference
from corda_kernels.kernels.reference import CHOLESKY_ATTEMPTS

_WARP = 32
# Bounds of the kernels themselves: threads of a block, and sizes whose columns the registers hold.
_SVD_THREADS = {torch.float32: 1024, torch.float64: 768}
_SVD_ROWS = {torch.float32: 256, torch.float64: 192}
_CHOLESKY_THREADS = 1024

# 7 to 9 are usual; a matrix that needs more than this many holds something else than numbers.
_MAX_SWEEPS = 40


def batched_svd(
    t: Tensor,  # (b, l, l)
    exact: bool,
) -> tuple[Tensor, Tensor]:  # (b, l, l), (b, l)
    """U and S by one-sided Jacobi. See `kernels.batched_svd`."""
    l = t.shape[-1]
    fits = svd_shared_bytes(l, t.dtype) <= cuda_loader.shared_memory(t.device)
    if not fits or l > _SVD_ROWS[t.dtype]:
        return reference.batched_svd(t, exact)
    U, S, _ = jacobi_svd(t)
    return U, S


def batched_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (b, d, d)
    """Factors, dampings and attempts. See `kernels.batched_cholesky`."""
    d = matrix.shape[-1]
    shared = d * (d + 1) // 2 * matrix.element_size()
    if shared > cuda_loader.shared_memory(matrix.device):
        return reference.batched_cholesky(matrix)
    matrix = matrix.contiguous()
    factor = torch.empty_like(matrix)
    damping = matrix.new_empty(matrix.shape[0])
    attempts = torch.empty(matrix.shape[0], dtype=torch.int64, device=matrix.device)
    if matrix.numel():
        cuda_loader.launch(
            f"damped_cholesky_{_suffix(matrix)}",
            matrix.shape[0],
            min(_CHOLESKY_THREADS, _WARP * d),
            shared,
            (matrix, factor, damping, attempts),
            (d, CHOLESKY_ATTEMPTS),
        )
    return factor, damping, attempts


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
        shared = svd_shared_bytes(l, t.dtype)
        cuda_loader.launch(
            f"jacobi_svd_{_suffix(t)}",
            b,
            _svd_threads(l, t.dtype),
            shared,
            (t, U, S, sweeps),
            (l, max_sweeps),
        )
    return U, S, sweeps


def svd_shared_bytes(l: int, dtype: torch.dtype) -> int:
    """Shared memory for one matrix: SvdMemory in csrc/jacobi_svd.cuh."""
    numbers, indices = l * l + l + _WARP, 2 * l
    return numbers * dtype.itemsize + indices * torch.int32.itemsize


def _svd_threads(l: int, dtype: torch.dtype) -> int:
    """As many warps as share the ⌈l/2⌉ pairs of a round evenly: 85 pairs take 4 times 22 warps."""
    pairs = (l + 1) // 2
    turns = math.ceil(pairs * _WARP / _SVD_THREADS[dtype])
    return _WARP * math.ceil(pairs / turns)


def _suffix(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
