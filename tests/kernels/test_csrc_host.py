"""The kernels of csrc/ on a CPU: the same source, every CUDA thread a fiber.

That checks indices, barriers, races between them, and the numerics. It says nothing of speed.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from pairs import pairwise
from torch import Tensor

from corda_kernels.kernels import cuda, reference
from corda_kernels.kernels.cuda import batched_svd, jacobi_svd

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux for its fibers"),
]

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.float64]
HOPPER_BYTES = 232448
SHUFFLED = 7  # 0 runs the threads by number, 1 backwards, anything else is a seed

# Singular values of an l × l matrix, the largest 1.
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "graded": lambda l: torch.logspace(0, -12, l, dtype=torch.float64),
    "flat": lambda l: torch.ones(l, dtype=torch.float64),
    "two clusters": lambda l: torch.where(torch.arange(l) < (l + 1) // 2, 1.0, 1e-6).double(),
    "near ones": lambda l: 1 - 1e-9 * torch.arange(l, dtype=torch.float64),
    "rank deficient": lambda l: (torch.arange(l) < (l + 1) // 2).double(),
    "one outlier": lambda l: torch.cat([torch.ones(1), torch.full((l - 1,), 1e-3)]).double(),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("csrc") / "kernels.so"
    command = ["g++", "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{cuda.sources()}", "-o", str(path)]
    command.append(str(HERE / "cuda_on_cpu" / "launch.cpp"))
    subprocess.run(command, check=True)
    return path


@pytest.fixture(autouse=True)
def order(library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Launches go to the CPU, with the threads in an order that can be set."""
    loaded = ctypes.CDLL(str(library))
    chosen = [SHUFFLED]

    def launch(
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        tensors: Sequence[Tensor],
        numbers: Sequence[int],
    ) -> None:
        assert all(tensor.is_contiguous() for tensor in tensors)
        getattr(loaded, f"launch_{name}")(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            *map(ctypes.c_int, numbers),
            ctypes.c_int(blocks),
            ctypes.c_int(threads),
            ctypes.c_size_t(shared_bytes),
            ctypes.c_int(chosen[0]),
        )

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "shared_memory", lambda device: HOPPER_BYTES)
    return lambda value: chosen.__setitem__(0, value)


def orthogonal(l: int) -> Tensor:
    return torch.linalg.qr(torch.randn(l, l, dtype=torch.float64)).Q


def matrix(spectrum: str, l: int) -> Tensor:
    return orthogonal(l) * SPECTRA[spectrum](l) @ orthogonal(l)


def check(t: Tensor, U: Tensor, S: Tensor) -> None:
    """U and S of one matrix: orthonormal, descending, and right to the rounding of its dtype.

    Some 40 eps were measured for 64 × 64 in either dtype: each column is rotated 500 times.
    """
    l, eps = t.shape[-1], torch.finfo(t.dtype).eps
    allowed = eps * max(l, 16)
    exact = torch.linalg.svdvals(t.double())
    scale = exact[0].clamp_min(1e-300)
    assert bool((S.diff() <= 0).all())
    assert bool((S >= 0).all())
    assert float((S.double() - exact).abs().max() / scale) <= allowed
    identity = torch.eye(l, dtype=torch.float64)
    assert float((U.double().mT @ U.double() - identity).abs().max()) <= 2 * eps * max(8, l**0.5)
    # Uᵀt has orthogonal rows of lengths S.
    rows = U.double().mT @ (t.double() / scale)
    squares = torch.diag((S.double() / scale).square())
    assert float((rows @ rows.mT - squares).abs().max()) <= 2 * allowed


@pairwise(dtype=DTYPES, l=[1, 2, 3, 8, 17, 32, 33], spectrum=list(SPECTRA))
def test_svd_of_every_spectrum(dtype: torch.dtype, l: int, spectrum: str) -> None:
    t = matrix(spectrum, l).to(dtype)
    U, S, sweeps = jacobi_svd(t[None])
    check(t, U[0], S[0])
    assert 1 <= int(sweeps) <= 12


@pytest.mark.parametrize(
    ("l", "dtype", "spectrum"),
    [
        (63, torch.float32, "graded"),
        (63, torch.float64, "two clusters"),
        (64, torch.float32, "rank deficient"),
        (64, torch.float64, "graded"),
        (97, torch.float64, "one outlier"),  # 49 pairs for 24 warps, four rows a lane
    ],
)
def test_svd_of_larger_matrices(l: int, dtype: torch.dtype, spectrum: str) -> None:
    t = matrix(spectrum, l).to(dtype)
    U, S, _ = jacobi_svd(t[None])
    check(t, U[0], S[0])


def test_tiny_singular_values_of_a_scaled_matrix_are_right_relative_to_themselves() -> None:
    scales = torch.logspace(0, -8, 20, dtype=torch.float64)[torch.randperm(20)]
    t = (scales[:, None] * (orthogonal(20) + 0.3 * orthogonal(20))).float()
    exact = torch.linalg.svdvals(t.double())  # itself right to about 1e-8
    S = jacobi_svd(t[None])[1][0].double()
    assert float((S / exact - 1).abs().max()) <= 1e-5
    lapack = torch.linalg.svdvals(t).double()
    assert float((lapack / exact - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers_of_two_change_nothing_but_the_scale(dtype: torch.dtype) -> None:
    t = matrix("graded", 12).to(dtype)
    U, S, _ = jacobi_svd(t[None])
    # The squares of these entries are out of range.
    for power in (-80, 120) if dtype == torch.float32 else (-900, 1000):
        scaled = t.double() * 2.0**power
        scaled_U, scaled_S, _ = jacobi_svd(scaled.to(dtype)[None])
        assert torch.equal(scaled_U, U)
        assert torch.equal(scaled_S, (S.double() * 2.0**power).to(dtype))


def test_a_diagonal_far_below_the_squares_of_its_dtype() -> None:
    values = torch.logspace(0, -28, 15)
    order = torch.randperm(15)
    U, S, sweeps = jacobi_svd(torch.diag(values[order])[None])
    torch.testing.assert_close(S[0], values, rtol=2e-7, atol=0)
    torch.testing.assert_close(U[0].abs()[order.argsort()], torch.eye(15), rtol=0, atol=1e-6)
    assert int(sweeps) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_u_is_orthonormal_where_sigma_is_zero(dtype: torch.dtype) -> None:
    single = torch.zeros(9, 9)
    single[4, 7] = -3
    low = torch.randn(9, 2) @ torch.randn(2, 9)
    low[[0, 5]] = 0  # dead rows
    repeated = torch.ones(9, 9)
    t = torch.stack([torch.zeros(9, 9), single, low, repeated, low.mT]).to(dtype)
    U, S, _ = jacobi_svd(t)
    for index in range(len(t)):
        check(t[index], U[index], S[index])
    assert torch.equal(U[0], torch.eye(9, dtype=dtype))
    assert S[0].tolist() == [0] * 9
    assert S[1].tolist() == [3] + [0] * 8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_ends_as_nan_and_touches_no_other(
    dtype: torch.dtype, bad: float
) -> None:
    t = torch.randn(3, 6, 6, dtype=dtype)
    alone, values, _ = jacobi_svd(t)
    t[1, 5, 2] = bad
    U, S, sweeps = jacobi_svd(t)
    assert int(sweeps[1]) == -1
    assert bool(U[1].isnan().all())
    assert bool(S[1].isnan().all())
    for index in (0, 2):
        assert torch.equal(U[index], alone[index])
        assert torch.equal(S[index], values[index])


def test_what_does_not_converge_ends_as_nan() -> None:
    U, S, sweeps = jacobi_svd(torch.randn(1, 8, 8), max_sweeps=2)
    assert int(sweeps) == -2
    assert bool(U.isnan().all())
    assert bool(S.isnan().all())


def test_strided_and_empty_batches() -> None:
    t = torch.randn(4, 7, 7).mT[::2]
    U, S, _ = jacobi_svd(t)
    for index in range(2):
        check(t[index], U[index], S[index])
    for shape in ((0, 5, 5), (3, 0, 0)):
        U, S, sweeps = jacobi_svd(torch.zeros(shape))
        assert (U.shape, S.shape, sweeps.shape) == (shape, shape[:2], shape[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("l", [9, 34])
def test_no_result_depends_on_the_order_of_the_threads(
    order: Callable[[int], None], l: int, dtype: torch.dtype
) -> None:
    t = torch.stack([matrix("graded", l), matrix("rank deficient", l)]).to(dtype)
    t[1, :, ::3] = 0
    results = []
    for value in (0, 1, SHUFFLED):
        order(value)
        results.append(jacobi_svd(t))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_the_launcher_notices_faults(library: Path) -> None:
    for kind, message in enumerate(
        [
            "threads wait at different barriers",
            "threads wait at different barriers",
            "a write beyond the shared memory",
        ]
    ):
        code = f"import ctypes; ctypes.CDLL({str(library)!r}).launch_fault({kind})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0
        assert message in done.stderr


def test_shared_memory_is_exactly_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.svd_shared_bytes(239, torch.float32) <= HOPPER_BYTES
    assert cuda.svd_shared_bytes(240, torch.float32) > HOPPER_BYTES
    assert cuda.svd_shared_bytes(169, torch.float64) <= HOPPER_BYTES
    assert cuda.svd_shared_bytes(170, torch.float64) > HOPPER_BYTES
    t = torch.randn(2, 6, 6)
    monkeypatch.setattr(cuda, "launch", lambda *_: pytest.fail("does not fit"))
    svd_bytes = cuda.svd_shared_bytes(6, torch.float32)
    monkeypatch.setattr(cuda, "shared_memory", lambda device: svd_bytes - 1)
    assert torch.equal(batched_svd(t, exact=False)[1], reference.batched_svd(t, exact=False)[1])
