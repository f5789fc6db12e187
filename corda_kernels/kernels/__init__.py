"""The kernels, from tensors to tensors, and the one place that picks them by device.

An operation is looked up in `_TABLE` under the backend in force: the one named by `use_backend`, or
else the first in the device's order of preference that has it. `reference` has every operation and
runs on every device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from corda_kernels.arguments import flag, holds_numbers, one_of, real_number, real_tensor, shown
from corda_kernels.errors import BackendError, ConfigError
from corda_kernels.kernels import cpu, cuda, reference, syrk_sm90

__all__ = [
    "available_backends",
    "batched_svd",
    "symmetrize_",
    "syrk_",
    "use_backend",
]

# CuPy is not imported for its type: whatever speaks DLPack will do.
Array = Tensor | np.ndarray[Any, Any] | Any
ArrayT = TypeVar("ArrayT")
# Does a call of `syrk_` again that has been checked: c, inputs, absmax, counts.
Repeat = Callable[..., object]


def _each(run: Callable[..., None]) -> Callable[..., None]:
    """A SYRK of one input as one of several."""

    def run_each(c: Tensor, inputs: Sequence[Tensor], *options: Any) -> None:
        for x in inputs:
            run(c, x, *options)

    return run_each


def _triton_syrk(c: Tensor, inputs: Sequence[Tensor], alpha: float, *options: Any) -> Repeat:
    # Triton is loaded at its first use: it is not installed everywhere, and importing it is slow.
    from corda_kernels.kernels import triton_syrk

    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
        for x in inputs:
            triton_syrk.syrk_(c, x, alpha, *options)
    _, _, *others = options
    return lambda c, inputs, *statistics: _triton_syrk(c, inputs, alpha, *statistics, *others)


def _sm90_syrk(c: Tensor, inputs: Sequence[Tensor], *options: Any) -> Repeat | None:
    submit = syrk_sm90.syrk_(c, inputs, *options)
    if submit is not None:
        return lambda *_: submit()
    other = "triton" if _no_triton() is None else "reference"
    repeat: Repeat | None = _TABLE["syrk_", other](c, inputs, *options)
    return repeat


@functools.cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; it comes with torch's CUDA build"
    from corda_kernels.kernels import triton_syrk

    return triton_syrk.unavailable()


def _of_nvidia(why_not: Callable[[], str | None]) -> Callable[[], str | None]:
    """Refuses AMD's devices first, which torch calls "cuda" too."""
    rocm = "its kernels are for NVIDIA's GPUs, and this torch is for AMD's (ROCm)"
    return lambda: rocm if torch.version.hip else why_not()


# Products in float64 are an operation of their own: not every backend has them.
_TABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("syrk_", "reference"): _each(reference.syrk_),
    ("syrk_", "cpu"): _each(cpu.syrk_),
    ("syrk_", "triton"): _triton_syrk,
    ("syrk_", "sm90"): _sm90_syrk,
    ("syrk_float64", "reference"): _each(reference.syrk_),
    ("syrk_float64", "cpu"): _each(cpu.syrk_),
    ("symmetrize_", "reference"): reference.symmetrize_,
    ("symmetrize_", "cpu"): cpu.symmetrize_,
    ("batched_svd", "reference"): reference.batched_svd,
    ("batched_svd", "cuda"): cuda.batched_svd,
}
# Asked one by one: an answer may load a library, or compile.
_WHY_NOT: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": lambda: None,
    "triton": _of_nvidia(_no_triton),
    "cuda": _of_nvidia(cuda.unavailable),
    "sm90": _of_nvidia(syrk_sm90.unavailable),
}
# "sm90" runs where it is asked for only, until a GPU has shown it right and faster than "triton".
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
# By all that a call of `syrk_` depends on. In calibration the checks, and what a backend prepares,
# would take longer than the device needs. Repeats hold no tensors.
_repeats: dict[object, Repeat] = {}
_REPEATS = 4096
_forced: ContextVar[str | None] = ContextVar("corda_kernels_backend", default=None)


def available_backends(operation: str | None = None) -> dict[str, str | None]:
    """Every backend by name, with None if it can run here and otherwise the reason why not.

    Args:
        operation: name of a function of this module, to list only the backends that have it.


    Raises:
        BackendError: there is no such function.
    """
    one_of("operation", operation, (None, *dict.fromkeys(name for name, _ in _TABLE)), BackendError)
    return {
        backend: why_not()
        for backend, why_not in _WHY_NOT.items()
        if operation is None or (operation, backend) in _TABLE
    }


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every kernel inside the block on backend `name`; None restores the choice by device.

    An operation that the backend lacks runs on `reference`.

    Raises:
        BackendError: there is no such backend, or it cannot run here.
    """
    if name is not None:
        if not isinstance(name, str) or name not in _WHY_NOT:
            raise BackendError(f"there is no backend {shown(name)}; known: {', '.join(_WHY_NOT)}")
        reason = _WHY_NOT[name]()
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run here: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _implementation(operation: str, device: torch.device) -> Callable[..., Any]:
    forced = _forced.get()
    order = (forced,) if forced is not None else _PREFERENCE.get(device.type, ())
    for backend in order:
        found = _TABLE.get((operation, backend))
        if found is not None and _WHY_NOT[backend]() is None:
            return found
    return _TABLE[(operation, "reference")]


def syrk_(
    c: ArrayT,  # (d, d)
    x: Array | Sequence[Array],  # (n, d) each
    *,
    alpha: float = 1.0,
    absmax: Array | None = None,  # (d,)
    outlier_count: Array | None = None,  # (d,)
    outlier_threshold: float = 6.0,
    precision: Literal["default", "high"] = "default",
    deterministic: bool = False,
) -> ArrayT:
    """Adds alpha·xᵀx to the lower triangle of `c`, with channel statistics in the same pass.

    Equivalent to `c += alpha * x.T @ x` on the lower triangle (the strict upper triangle is left
    unspecified; see `symmetrize_`), `absmax = max(absmax, |x|.amax(0))` and `outlier_count += (|x|
    > outlier_threshold).sum(0)`. NaN is ignored in both statistics, and appears in c. Arrays may be
    torch's, NumPy's or CuPy's; none is copied.


    Args:
        c: (d, d) float32 or float64, updated in place.
        x: (n, d) bf16, fp16, fp32 or fp64, with any row stride, n ≥ 0; or a list of such arrays,
            each with its own n.
        alpha: factor of the product; it does not change the statistics.

        absmax: (d,) float32, updated in place with the largest |x| of each channel.
        outlier_count: (d,) int64, updated in place with the number of |x| above the threshold in
            each channel.
        outlier_threshold: threshold in units of x, rounded to its dtype.
        precision: "high" sums shorter chains on a GPU's tensor cores, and multiplies float32 there
            in three tf32 products instead of three bf16 ones; it changes nothing on a CPU.
        deterministic: whether to add in a fixed order, so that a run on a GPU can be repeated bit
            for bit.


    Returns:
        c.

    Raises:
        ConfigError: a shape, dtype, device or option does not fit.
    """
    given = c, x, absmax, outlier_count
    chosen = alpha, outlier_threshold, precision, deterministic
    if _repeats and (repeat := _repeats.get(_call(*given, *chosen))):
        repeat(c, x if isinstance(x, list | tuple) else (x,), absmax, outlier_count)
        return c
    one_of("precision", precision, ("default", "high"))
    flag("deterministic", deterministic)
    alpha = real_number("alpha", alpha, "a finite number", math.isfinite)
    outlier_threshold = check_threshold(outlier_threshold)
    total = _tensor(c)
    inputs = [_tensor(rows) for rows in x] if isinstance(x, list | tuple) else [_tensor(x)]
    largest, above = (
        None if array is None else _tensor(array) for array in (absmax, outlier_count)
    )
    _check_syrk(total, inputs, largest, above)
    # In-place sums would be recorded if x needed gradients.
    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
        filled = [rows for rows in inputs if rows.shape[0]]
        for dtype, group in itertools.groupby(filled, lambda rows: rows.dtype):
            wide = torch.float64 in (total.dtype, dtype)
            run = _implementation("syrk_float64" if wide else "syrk_", total.device)
            alike = list(group)
            options = alpha, largest, above, outlier_threshold, precision, deterministic
            repeat = run(total, alike, *options)
            whole = repeat is not None and len(alike) == len(inputs)
            if whole and (call := _call(*given, *chosen)) is not None:
                if len(_repeats) >= _REPEATS:
                    _repeats.clear()
                _repeats[call] = repeat
    return c


def check_threshold(outlier_threshold: float) -> float:
    """The threshold as a float; infinity counts no outliers.

    Raises:
        ConfigError: it is no number of at least 0.
    """
    return real_number("outlier_threshold", outlier_threshold, "at least 0", lambda x: x >= 0)


def _call(
    c: Array,
    x: Array | Sequence[Array],
    absmax: Array | None,
    outlier_count: Array | None,
    *options: object,
) -> object:
    """All that a call depends on, but for the numbers in its arrays; None if it cannot be told."""
    # 1 is as good a key as True, but no flag; a tensor for a number may change.
    if tuple(map(type, options)) != (float, float, str, bool):
        return None
    arrays = (c, absmax, outlier_count, *(x if isinstance(x, list | tuple) else (x,)))
    try:
        where = [
            a is not None and (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device) for a in arrays
        ]
    except (AttributeError, RuntimeError):  # of NumPy, or sparse
        return None
    return _forced.get(), options, *where


def _tensor(array: Array) -> Tensor:
    """The same memory as a tensor."""
    if isinstance(array, Tensor):
        return array
    try:
        if isinstance(array, np.ndarray):
            return torch.from_numpy(array)
        if hasattr(array, "__dlpack__"):
            return from_dlpack(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise ConfigError(f"an array cannot be used as it is ({error}): copy it first") from error
    raise ConfigError(f"expected an array of torch, NumPy or CuPy, got {type(array).__name__}")


@torch.no_grad()
def symmetrize_(c: Tensor) -> Tensor:
    """Copies the lower triangle of `c` (*batch, d, d) onto the upper, in place; returns `c`.

    Raises:
        ConfigError: c is no dense floating-point tensor, or not square.
    """
    real_tensor("c", c, ConfigError)
    if c.ndim < 2 or c.shape[-1] != c.shape[-2]:
        raise _misfit("c", "(*batch, d, d)", c)
    result: Tensor = _implementation("symmetrize_", c.device)(c)
    return result


@torch.no_grad()
def batched_svd(t: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of many small square matrices.

    Equivalent to `torch.linalg.svd(t)[:2]`, up to the signs of the vectors. The core of a
    randomised SVD is such a matrix, and needs no right vectors.

    - On a CPU torch computes in float64.
    - On a GPU backend "cuda" computes in the dtype of t, by one-sided Jacobi in shared memory, up
      to l = 239 in float32 and 169 in float64 on H100 (227 KiB), 202 and 143 on A100 (163 KiB). At
      l = 64 errors are 2e-14 of the largest σ in float64 and 4e-6 in float32; 32 matrices take an
      H100 1.6 and 1.1 ms.
    - On a GPU larger matrices, and all without that backend, go through the eigenvectors of t·tᵀ in
      float64. Directions below 1e-8 of the largest σ are then mixed, with σ as inexact.

    Args:
        t: (*batch, l, l) float32 or float64.
        exact: whether to use torch.linalg.svd, which takes several times as long, in place of the
            eigenvectors of t·tᵀ.

    Returns:
        U (*batch, l, l) with orthonormal columns, also where σ is 0, and S (*batch, l), descending,
        in the dtype of t. A matrix with NaN or Inf gets NaN for both, because raising an error
        would mean waiting for the device.


    Raises:
        ConfigError: the shape or dtype does not fit.
        BackendError: the backend in force cannot run on t's device.
    """
    flag("exact", exact)
    real_tensor("t", t, ConfigError)
    if t.ndim < 2 or t.shape[-1] != t.shape[-2] or t.dtype not in (torch.float32, torch.float64):
        raise _misfit("t", "(*batch, l, l) in float32 or float64", t)
    flat = t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:])
    U, S = _implementation("batched_svd", t.device)(flat, exact)
    return U.reshape(t.shape), S.reshape(t.shape[:-1])


def _check_syrk(
    c: Tensor,
    inputs: list[Tensor],
    absmax: Tensor | None,
    outlier_count: Tensor | None,
) -> None:
    for name, array in (("c", c), ("absmax", absmax), ("outlier_count", outlier_count)):
        if array is not None and not holds_numbers(array):
            raise ConfigError(f"{name} must be a dense array that holds its values")
    d = c.shape[-1] if c.ndim else 0
    if c.shape != (d, d) or c.dtype not in (torch.float32, torch.float64):
        raise _misfit("c", "(d, d) in float32 or float64", c)
    for rows in inputs:
        if (
            rows.ndim != 2
            or rows.shape[1] != d
            or not rows.is_floating_point()
            or rows.itemsize < 2
            or rows.layout != torch.strided
            or rows.device != c.device
        ):
            wanted = f"(n, {d}), dense, in a floating dtype of 16 bits or more on {c.device}"
            raise _misfit("x", wanted, rows)
    for name, statistic, dtype in (
        ("absmax", absmax, torch.float32),
        ("outlier_count", outlier_count, torch.int64),
    ):
        if statistic is not None and (
            statistic.shape != (d,) or statistic.dtype != dtype or statistic.device != c.device
        ):
            raise _misfit(name, f"({d},) in {dtype} on {c.device}", statistic)


def _misfit(name: str, wanted: str, got: Tensor) -> ConfigError:
    shape = tuple(got.shape)
    return ConfigError(f"{name} must be {wanted}, got {shape} in {got.dtype} on {got.device}")
