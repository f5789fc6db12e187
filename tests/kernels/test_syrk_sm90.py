"""The kernel for compute capability 9.0 on a CPU, and the host's part of it: the same source.

Every thread of a cluster is a fiber, and copies and products happen at random moments between
their start and the wait for them (`cuda_on_cpu/hopper.hpp`). That checks swizzles, descriptors,
fragments, barriers, shares and the layout of the argument; it says nothing of speed, nor whether
the PTX in `csrc/hopper.cuh` is right.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import platform
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import pairwise
from torch import Tensor

from corda_kernels import kernels
from corda_kernels.errors import BackendError, ConfigError
from corda_kernels.kernels import cuda, reference, shares, syrk_, syrk_sm90, use_backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux for its fibers"),
]

HERE = Path(__file__).parent
GUARD = 7.0  # outside C, where nothing may be written


class Matrix(ctypes.Structure):
    """What `cuda_on_cpu/hopper.hpp` reads in place of the driver's encoding."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("columns", "rows", "stride_bytes")),
        *((name, ctypes.c_int32) for name in ("box_columns", "box_rows", "item_bytes")),
    )


def build(sources: Path, output: Path) -> Path:
    command = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{sources}", "-o", str(output)]
    command.append(str(HERE / "cuda_on_cpu" / "launch_sm90.cpp"))
    subprocess.run(command, check=True)
    return output


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(cuda.sources(), tmp_path_factory.mktemp("sm90") / "kernel.so")


class Driver:
    """What is used of libcuda: tensor maps are plain numbers, launches go to the CPU."""

    def __init__(self, library: Path, seed: int) -> None:
        self.kernels = ctypes.CDLL(str(library))
        self.seed = seed
        self.launches: list[dict[str, int]] = []

    def cuTensorMapEncodeTiled(self, place: Any, *given: Any) -> int:  # noqa: N802
        dtype, rank, data, shape, strides, box, steps, interleave, swizzle, _, fill = given
        size = {6: 2, 7: 4, 9: 2}[dtype.value]
        fixed = rank.value, *steps, interleave.value, swizzle.value, fill.value
        assert fixed == (2, 1, 1, 0, 3, 0)
        assert ctypes.addressof(place) % 64 == 0
        assert data.value % 16 == strides[0] % 16 == 0
        values = data.value, *shape, strides[0], *box, size
        Matrix.from_buffer(place).__init__(*values)  # type: ignore[misc]
        return 0

    def cuLaunchKernel(self, function: Any, *given: Any) -> int:  # noqa: N802
        grid, _, _, threads, _, _, shared_bytes, _, arguments, _ = given
        assert threads == 384
        bfloat16, statistics = divmod(function.value - 1, 2)
        self.launches.append({"grid": grid, "statistics": statistics})
        pointer = ctypes.c_void_p(arguments[0])
        self.kernels.launch_syrk(pointer, bfloat16, statistics, grid, shared_bytes, self.seed)
        return 0


Run = Callable[..., tuple[Tensor, Tensor, Tensor]]


def runner(library: Path, patch: pytest.MonkeyPatch, clusters: int = 2, seed: int = 2) -> Run:
    """A function that gives C, absmax and counts of inputs, by the kernel on a CPU."""
    driver = Driver(library, seed)
    # As large as the host's for the driver, which copies what the kernel takes.
    assert driver.kernels.launch_bytes() <= ctypes.sizeof(syrk_sm90.Launch) + 64
    names = ("float16", "float16_statistics", "bfloat16", "bfloat16_statistics")
    functions = {f"syrk_{name}": types.SimpleNamespace(ptr=i + 1) for i, name in enumerate(names)}
    patch.setattr(syrk_sm90, "_driver", lambda: driver)
    patch.setattr(syrk_sm90, "_functions", lambda device: functions)
    patch.setattr(syrk_sm90, "_multiprocessors", lambda device: 2 * clusters)
    patch.setattr(torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=0))
    patch.setattr(torch.cuda, "device", contextlib.nullcontext)
    shares.divided.cache_clear()

    def run(*inputs: Tensor, threshold: float = 1.5, **options: Any) -> tuple[Tensor, ...]:
        d = inputs[0].shape[1]
        whole = torch.full((d + 40, -(-(d + 40) // 4) * 4), GUARD)
        c = whole[:d, :d]
        c.zero_()[torch.ones(d, d).triu(1).bool()] = torch.nan
        options = {
            "alpha": 1.0,
            "absmax": torch.zeros(d),
            "outlier_count": torch.zeros(d, dtype=torch.int64),
            "precision": "default",
            "deterministic": False,
        } | options
        assert syrk_sm90.syrk_(c, inputs, outlier_threshold=threshold, **options) is not None
        guard = torch.ones_like(whole, dtype=torch.bool)
        guard[:d, :d] = False
        assert bool((whole[guard] == GUARD).all())
        return c, options["absmax"], options["outlier_count"]

    run.driver = driver  # type: ignore[attr-defined]
    return run


@pytest.fixture
def run(library: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(library, monkeypatch)


def random(n: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows that start at multiples of 16 bytes, and NaN beyond them."""
    wide = torch.full((n, -(-d // 8) * 8), torch.nan).to(dtype)
    wide[:, :d] = torch.randn(n, d).to(dtype)
    return wide[:, :d]


def error(c: Tensor, x: Tensor) -> float:
    exact = (x.double().T @ x.double()).tril()
    return float((c.double().tril() - exact).norm() / exact.norm())


def check(found: tuple[Tensor, Tensor, Tensor], x: Tensor, threshold: float = 1.5) -> None:
    c, absmax, count = found
    assert error(c, x) <= 1e-6
    expected = torch.zeros_like(absmax), torch.zeros_like(count)
    reference.channel_statistics_(x, *expected, threshold)
    assert torch.equal(absmax, expected[0])
    assert torch.equal(count, expected[1])


@pairwise(
    n=[1, 63, 64, 65, 200, 330, 640],
    d=[8, 33, 64, 136, 256, 300, 521],
    dtype=[torch.bfloat16, torch.float16],
    clusters=[1, 2, 5],
    seed=[2, 3, 4, 5],
)
def test_any_shape_on_any_number_of_clusters(
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    d: int,
    dtype: torch.dtype,
    clusters: int,
    seed: int,
) -> None:
    monkeypatch.setattr(shares, "_SHORTEST_PART", 128)
    x = random(n, d, dtype)
    check(runner(library, monkeypatch, clusters, seed)(x), x)


def test_several_inputs_are_one_launch(run: Any) -> None:
    parts = [random(n, 72) for n in (1, 130, 64, 7)]
    check(run(*parts), torch.cat(parts))
    assert len(run.driver.launches) == 1


def test_more_inputs_than_an_argument_holds(run: Any) -> None:
    parts = [random(3 + n, 40) for n in range(19)]
    check(run(*parts), torch.cat(parts))
    assert len(run.driver.launches) == 2


def test_strided_rows(run: Run) -> None:
    x = random(300, 520)[::3, 8:200]
    check(run(x), x)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["default", "high"])
def test_several_chains_add_up(
    run: Any, precision: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syrk_sm90, "_LONGEST_CHAIN", {"default": 256, "high": 128})
    x = random(600, 270)
    check(run(x, precision=precision, deterministic=deterministic), x)
    chains = {"default": 3, "high": 5}[precision]
    assert len(run.driver.launches) == (chains if deterministic else 1)


def test_deterministic_sums_do_not_depend_on_the_order_of_the_threads(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syrk_sm90, "_LONGEST_CHAIN", {"default": 128})
    parts = [random(n, 300) for n in (290, 70)]
    found = [
        runner(library, monkeypatch, clusters, seed)(*parts, deterministic=True)[0].tril()
        for clusters, seed in ((1, 2), (3, 3), (7, 4))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_alpha_and_the_sums_of_earlier_calls(run: Run) -> None:
    x = random(100, 40)
    c, absmax, count = run(x, alpha=-0.5)
    absmax[3] = 100
    again = run(x[:30], absmax=absmax, outlier_count=count)
    assert error(-2 * c, x) <= 1e-6
    assert float(again[1][3]) == 100
    assert torch.equal(count, (x.abs() > 1.5).sum(0) + (x[:30].abs() > 1.5).sum(0))


@pytest.mark.parametrize("wanted", ["absmax", "outlier_count", None])
def test_either_statistic_alone_or_none(run: Any, wanted: str | None) -> None:
    x = random(90, 136)
    without = {name: None for name in ("absmax", "outlier_count") if name != wanted}
    c, absmax, count = run(x, **without)
    assert error(c, x) <= 1e-6
    if wanted == "absmax":
        assert torch.equal(absmax, x.abs().amax(0).float())
    if wanted == "outlier_count":
        assert torch.equal(count, (x.abs() > 1.5).sum(0))
    assert [one["statistics"] for one in run.driver.launches] == [int(wanted is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0, float("inf")])
def test_threshold_is_taken_in_the_dtype_of_x(
    run: Run, threshold: float, dtype: torch.dtype
) -> None:
    x = random(80, 40, dtype)
    x[5] = threshold if threshold < 9 else 60000
    _, absmax, count = run(x, threshold=threshold)
    assert torch.equal(absmax, x.abs().amax(0).float())
    assert torch.equal(count, (x.abs() > threshold).sum(0))


def test_nan_counts_in_no_statistic_and_reaches_the_diagonal(run: Run) -> None:
    x = random(70, 300)
    x[13, 7] = torch.nan
    x[:, 270] = torch.nan
    c, absmax, count = run(x)
    assert torch.equal(absmax, x.abs().nan_to_num(0).amax(0).float())
    assert torch.equal(count, (x.abs() > 1.5).sum(0))
    assert c.diagonal().isnan().nonzero().flatten().tolist() == [7, 270]


def test_what_the_kernel_does_not_take(run: Any) -> None:
    def taken(c: Tensor, *inputs: Tensor) -> bool:
        options = 1.0, None, None, 6.0, "default", False
        return syrk_sm90.syrk_(c, inputs, *options) is not None

    c, x = torch.zeros(40, 40), random(9, 40)
    assert taken(c, x, x)
    refused = [
        (c, x.float()),
        (c, x, x.half()),
        (torch.zeros(33, 33), random(9, 40)[:, :33]),  # rows of C
        (c, torch.zeros(9, 80, dtype=x.dtype)[:, 1:41]),  # the first row of x
        (c, torch.zeros(9, 44, dtype=x.dtype)[:, :40]),  # the others
        (c, torch.zeros(40, 9, dtype=x.dtype).T),
        (c, x[:1].expand(9, 40)),
    ]
    assert not any(taken(*tensors) for tensors in refused)
    assert len(run.driver.launches) == 1


@pytest.fixture
def dispatched(run: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`kernels.syrk_` on the backend sm90; gives its driver."""
    monkeypatch.setitem(kernels._WHY_NOT, "sm90", lambda: None)
    monkeypatch.setitem(kernels._WHY_NOT, "triton", lambda: None)
    monkeypatch.setattr(kernels, "_no_triton", lambda: "it is not asked for here")
    monkeypatch.setattr(kernels, "_repeats", {})
    with use_backend("sm90"):
        yield run.driver


def test_a_call_is_made_ready_once_and_repeated(
    dispatched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    prepare = syrk_sm90._launches
    monkeypatch.setattr(
        syrk_sm90, "_launches", lambda *given: prepared.append(1) or prepare(*given)
    )
    x, other = random(90, 48), random(90, 48)
    c, count = torch.zeros(48, 48), torch.zeros(48, dtype=torch.int64)
    for _ in range(3):
        assert syrk_(c, x, outlier_count=count) is c
    assert len(prepared) == 1
    assert error(c / 3, x) <= 1e-6
    assert torch.equal(count, 3 * (x.abs() > 6).sum(0))
    # Whatever is different is another call.
    syrk_(c, x[:80], outlier_count=count)
    syrk_(c, other, outlier_count=count)
    syrk_(c, x, outlier_count=count, outlier_threshold=1.0)
    syrk_(c, x)
    syrk_(c, [x, other], alpha=0.5)
    assert len(prepared) == len(dispatched.launches) - 2 == 6
    with use_backend("reference"):
        syrk_(c, x, outlier_count=count)
    assert len(dispatched.launches) == 8
    with pytest.raises(ConfigError, match="deterministic must be True or False"):
        syrk_(c, x, outlier_count=count, deterministic=0)  # type: ignore[arg-type]


def test_what_the_kernel_does_not_take_goes_elsewhere(dispatched: Any) -> None:
    parts = [random(30, 40), random(20, 40).float(), random(1, 40), random(0, 40)]
    c = torch.zeros(40, 40)
    for _ in range(2):
        syrk_(c, parts)
    exact = torch.cat([part.float() for part in parts])
    assert error(c / 2, exact) <= 1e-6
    assert len(dispatched.launches) == 4
    assert not kernels._repeats


def test_a_launch_that_fails_is_told(dispatched: Any) -> None:
    def failing(*_: Any) -> int:
        return 700

    def text(code: int, place: Any) -> None:
        place._obj.value = b"an illegal memory access was encountered"

    dispatched.cuLaunchKernel, dispatched.cuGetErrorString = failing, text
    with pytest.raises(BackendError, match="cuLaunchKernel: CUDA error 700, an illegal memory"):
        syrk_(torch.zeros(8, 8), random(3, 8))


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """CuPy's NVRTC, which notes what it compiles; `refuses` holds what it says."""

    def compile_(program: str, options: tuple[str, ...]) -> None:
        double.options.append(options)
        if double.refuses:
            raise RuntimeError("NVRTC_ERROR_COMPILATION")

    double = types.SimpleNamespace(
        options=[],
        refuses="",
        getVersion=lambda: (13, 0),
        createProgram=lambda source, name, *_: source,
        compileProgram=compile_,
        getProgramLog=lambda program: double.refuses,
        getCUBIN=lambda program: b"code",
    )
    for name, module in (("cupy", types), ("cupy.cuda", types.SimpleNamespace(nvrtc=double))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return double


def test_nvrtc_compiles_once_and_again_when_a_source_has_changed(
    nvrtc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = syrk_sm90._compiled()
    assert first.read_bytes() == b"code\0"
    assert first.parent == tmp_path / "cache"
    assert syrk_sm90._compiled() == first
    assert [options[0] for options in nvrtc.options] == ["-arch=sm_90a"]
    copy = tmp_path / "csrc"
    shutil.copytree(cuda.sources(), copy)
    (copy / "hopper.cuh").write_text("// later")
    monkeypatch.setattr(syrk_sm90, "sources", lambda: copy)
    assert syrk_sm90._compiled() != first
    assert len(nvrtc.options) == 2


def test_what_nvrtc_refuses_is_told(nvrtc: Any) -> None:
    nvrtc.refuses = "syrk_sm90.cu(1): error"
    with pytest.raises(BackendError, match=r"NVRTC_ERROR_COMPILATION: syrk_sm90.cu\(1\): error"):
        syrk_sm90._compiled()


def test_other_devices_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    syrk_sm90.unavailable.cache_clear()
    assert syrk_sm90.unavailable() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    syrk_sm90.unavailable.cache_clear()
    wanted = "compute capability 9.0 is needed, the device has 10.0"
    assert syrk_sm90.unavailable() == wanted
    syrk_sm90.unavailable.cache_clear()


def test_tensors_on_a_cpu_are_refused() -> None:
    options = 1.0, None, None, 6.0, "default", False
    with pytest.raises(BackendError, match="the backend sm90 needs tensors on a GPU"):
        syrk_sm90.syrk_(torch.zeros(8, 8), [random(3, 8)], *options)


# Where `wrong` holds, the kernel is wrong in a way that must make the tests above fail.
FAULTS = {
    "a stage is released while products still read it": (
        "if (last >= 0) release(last);",
        "if (wrong) release(ring.stage); else if (last >= 0) release(last);",
    ),
    "a stage may be overwritten while statistics are taken": (
        "Statistics ? 6 : 4",
        "Statistics && !wrong ? 6 : 4",
    ),
    "a block waits for its own half only": (
        "arrive_expecting(full, kStage)",
        "arrive_expecting(full, wrong ? kStage - kBox : kStage)",
    ),
    "the swizzle of the statistics is wrong": (
        "swizzled(line, chunk), words",
        "(wrong ? unsigned(line * 128 + chunk * 16) : swizzled(line, chunk)), words",
    ),
    "a row's tiles look at the wrong steps": ("until = sharers;", "until = sharers + wrong;"),
    "staged sums are overwritten while they are added": (
        "if (thread == 0) wait_for_reads<kStagings - 1>();",
        "if (thread == 0 && !wrong) wait_for_reads<kStagings - 1>();",
    ),
    "copies do not see what was staged": (
        "show_stores_to_copies();",
        "if (!wrong) show_stores_to_copies();",
    ),
    "a box too many is left out": ("> row + 63", "> row + (wrong ? 31 : 63)"),
    "the other block is not told of a stage it may fill": (
        "if (thread < 2) arrive_at",
        "if (thread < (wrong ? 1 : 2)) arrive_at",
    ),
    "a block leaves before the other": (
        "  __syncwarp();\n  cluster_sync();\n}",
        "  if (!wrong) {\n    __syncwarp();\n    cluster_sync();\n  }\n}",
    ),
    "sums are not awaited": ("wait_for_products<0>();", "if (!wrong) wait_for_products<0>();"),
    "operands are too far apart": (
        "Word(kBox >> 4) << 16",
        "Word(kBox >> (wrong ? 5 : 4)) << 16",
    ),
    "warps without products run ahead of each other": (
        "      } else {\n",
        "      } else if (!wrong) {\n",
    ),
    "additions are not awaited": (
        "if (thread == 0) wait_for_additions();",
        "if (thread == 0 && !wrong) wait_for_additions();",
    ),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel with all faults, of which none is chosen: to compile one takes seconds."""
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(cuda.sources(), folder / "csrc")
    kernel = folder / "csrc" / "syrk_sm90.cuh"
    text = kernel.read_text(encoding="utf-8")
    for number, (before, after) in enumerate(FAULTS.values()):
        assert text.count(before) == 1
        text = text.replace(before, after.replace("wrong", f"(chosen_fault == {number})"))
    kernel.write_text('extern "C" { int chosen_fault = -1; }\n' + text, encoding="utf-8")
    return build(folder / "csrc", folder / "kernel.so")


def passes(library: Path, fault: int | None = None) -> bool:
    """Whether some runs of a library are right. In a process of its own, for a fault may abort."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    faulthandler.disable()
    os.close(2)
    try:
        if fault is not None:
            ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "chosen_fault").value = fault
        for seed in range(2, 6):
            torch.manual_seed(seed)
            x = random(700, 521)
            with pytest.MonkeyPatch.context() as patch:
                check(runner(library, patch, 2, seed)(x), x)
    except AssertionError:
        os._exit(1)
    os._exit(0)


def test_the_runs_that_notice_faults_pass_without_one(faulty: Path) -> None:
    assert passes(faulty)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(faulty: Path, fault: str) -> None:
    assert not passes(faulty, list(FAULTS).index(fault))
