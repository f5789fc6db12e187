"""Building and loading the CUDA kernels where something is missing; nvcc and CuPy are doubles."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from corda_kernels import kernels
from corda_kernels.errors import BackendError
from corda_kernels.kernels import batched_svd, cuda_loader, fatbin, use_backend

SOURCES = cuda_loader.sources()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, from which the kernels are loaded."""
    copy = tmp_path / "csrc"
    copy.mkdir()
    for path in fatbin.source_files(SOURCES):
        shutil.copy(path, copy)
    monkeypatch.setattr(cuda_loader, "sources", lambda: copy)
    return copy


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a script in nvcc's place: what it lists as known code, and what it does to compile."""
    binary = tmp_path / "cuda" / "bin" / "nvcc"
    binary.parent.mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    def write(code: str, compilation: str) -> None:
        binary.write_text(
            "#!/bin/sh\n"
            f'case "$1" in --list-gpu-code) echo "{code}";;\n'
            '--version) echo "Cuda compilation tools, release 12.4, V12.4.131";;\n'
            f"*) {compilation};; esac\n"
        )
        binary.chmod(0o755)

    return write


WRITES = 'while [ "$1" != -o ]; do shift; done; echo code > "$2"'


def test_a_build_is_recorded(folder: Path, nvcc: Callable[[str, str], None]) -> None:
    nvcc("sm_80 sm_90 sm_100", WRITES)
    built = fatbin.build(folder, folder)
    assert built == fatbin.Build(fatbin.digest(folder), (80, 90, 100), "12.4.131")
    assert fatbin.recorded(folder) == built
    assert (folder / fatbin.FATBIN).read_text() == "code\n"
    assert fatbin.describe(folder) == "compiled for sm_80, sm_90, sm_100 by nvcc 12.4.131"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0)])
def test_a_fatbin_serves_later_devices(
    folder: Path,
    nvcc: Callable[[str, str], None],
    capability: tuple[int, int],
) -> None:
    nvcc("sm_80 sm_90 sm_100", WRITES)
    fatbin.build(folder, folder)
    assert fatbin.unusable(folder, capability) is None


def test_an_old_nvcc_compiles_what_it_knows(folder: Path, nvcc: Callable[[str, str], None]) -> None:
    nvcc("sm_90", WRITES)
    fatbin.build(folder, folder)
    assert fatbin.unusable(folder, (9, 0)) is None
    assert fatbin.unusable(folder, (10, 0)) is None  # from PTX
    assert fatbin.unusable(folder, (8, 6)) == "the fatbin has no code for sm_86, only sm_90"


@pytest.mark.parametrize(
    ("code", "compilation", "reason"),
    [
        (
            "sm_80",
            'echo "kernels.cu: note"; echo "kernels.cu(3): error: no such thing" >&2; exit 2',
            "nvcc failed at installation: kernels.cu(3): error: no such thing",
        ),
        ("sm_80", "exit 3", "nvcc failed at installation: exit status 3"),
        ("sm_70", WRITES, "nvcc 12.4.131 compiles for none of 80, 90, 100"),
    ],
)
def test_a_build_that_fails_is_recorded_with_the_reason(
    folder: Path, nvcc: Callable[[str, str], None], code: str, compilation: str, reason: str
) -> None:
    folder.joinpath(fatbin.FATBIN).write_text("of an earlier build")
    nvcc(code, compilation)
    assert fatbin.build(folder, folder).failure == reason
    assert not folder.joinpath(fatbin.FATBIN).exists()
    assert fatbin.unusable(folder, (9, 0)) == reason
    assert fatbin.describe(folder) == f"not compiled: {reason}"


def test_no_nvcc_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    fatbin.build(folder, folder)
    reason = "there was no nvcc at installation, on PATH or in CUDA_HOME"
    assert fatbin.unusable(folder, (9, 0)) == reason


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / fatbin.RECORD).unlink(), "no fatbin was built"),
        (lambda folder: (folder / fatbin.RECORD).write_text("{"), "record build.json is damaged"),
        (lambda folder: (folder / fatbin.RECORD).write_text("[]"), "record build.json is damaged"),
        (lambda folder: (folder / fatbin.RECORD).write_text("{}"), "record build.json is damaged"),
        (lambda folder: (folder / fatbin.FATBIN).unlink(), "the fatbin is missing"),
        (
            lambda folder: (folder / "block.cuh").write_text("// later"),
            "the fatbin was built from other sources",
        ),
    ],
)
def test_a_stale_or_damaged_fatbin_is_not_used(
    folder: Path,
    nvcc: Callable[[str, str], None],
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    nvcc("sm_80 sm_90 sm_100", WRITES)
    fatbin.build(folder, folder)
    damage(folder)
    assert reason in (fatbin.unusable(folder, (9, 0)) or "")


class Cupy(types.ModuleType):
    """What the loader uses of CuPy. `broken`: what raises, with the message."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.broken: dict[str, str] = {}
        self.modules: list[dict[str, Any]] = []
        self.launches: list[dict[str, Any]] = []
        self.streams: list[tuple[int, int]] = []
        limit = types.SimpleNamespace(
            cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
            deviceGetAttribute=lambda attribute, index: {(97, 0): 232448}[(attribute, index)],
        )
        self.cuda = types.SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(),
            Stream=types.SimpleNamespace(from_external=self._stream),
            runtime=limit,
        )

    def _stream(self, stream: Any) -> Any:
        self.streams.append(stream.__cuda_stream__())
        return contextlib.nullcontext()

    def RawModule(self, **given: Any) -> Any:  # noqa: N802
        self.modules.append(given)
        return types.SimpleNamespace(get_function=lambda name: self._function(name, given))

    def _function(self, name: str, given: dict[str, Any]) -> Any:
        for kind, message in self.broken.items():
            if kind in given:
                raise RuntimeError(message)
        cupy = self

        class Kernel:
            max_dynamic_shared_size_bytes = 0

            def __call__(self, grid: Any, block: Any, arguments: Any, shared_mem: int) -> None:
                launch = {"name": name, "grid": grid, "block": block, "arguments": arguments}
                cupy.launches.append(launch | {"shared": shared_mem, "kernel": self})

        return Kernel()


@pytest.fixture
def cupy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cupy]:
    """A GPU of compute capability 9.0 with CuPy, but neither fatbin nor NVRTC so far."""
    double = Cupy()
    double.broken = {"code": "libnvrtc.so.13 was not found\nin many places"}
    double.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "cupy", double)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for cached in (cuda_loader._load, cuda_loader.shared_memory, kernels._no_cuda):
        cached.cache_clear()
    yield double
    for cached in (cuda_loader._load, cuda_loader.shared_memory, kernels._no_cuda):
        cached.cache_clear()


def test_no_gpu(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_loader.unavailable() == "there is no CUDA device"


def test_an_early_gpu(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert cuda_loader.unavailable() == "compute capability 8.0 is needed, the device has 7.5"


def test_no_cupy(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda_loader.unavailable() == "CuPy is not installed: pip install 'corda_kernels[cuda]'"


def test_a_broken_cupy(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert (cuda_loader.unavailable() or "").startswith("CuPy cannot be loaded: import of cupy")


def test_no_sources(cupy: Cupy, folder: Path) -> None:
    shutil.rmtree(folder)
    reason = cuda_loader.unavailable() or ""
    assert reason.startswith("the CUDA sources are missing")


def test_neither_fatbin_nor_nvrtc(cupy: Cupy) -> None:
    assert cuda_loader.unavailable() == (
        "no fatbin was built, and NVRTC does not compile the kernels either: "
        "libnvrtc.so.13 was not found"
    )


def test_the_fatbin_needs_no_nvrtc(
    cupy: Cupy, folder: Path, nvcc: Callable[[str, str], None]
) -> None:
    nvcc("sm_90", WRITES)
    fatbin.build(folder, folder)
    assert cuda_loader.unavailable() is None
    assert cupy.modules == [{"path": str(folder / fatbin.FATBIN)}]


def test_nvrtc_takes_the_place_of_a_stale_fatbin(
    cupy: Cupy, folder: Path, nvcc: Callable[[str, str], None]
) -> None:
    cupy.broken = {}
    nvcc("sm_90", WRITES)
    fatbin.build(folder, folder)
    (folder / "block.cuh").write_text("// later")
    assert cuda_loader.unavailable() is None
    (module,) = cupy.modules
    assert module["code"] == (folder / "kernels.cu").read_text()
    assert f"-I{folder}" in module["options"]
    before = module["options"]
    (folder / "block.cuh").write_text("// again")
    cuda_loader._load.cache_clear()
    assert cuda_loader.unavailable() is None
    assert cupy.modules[-1]["options"] != before  # another entry of CuPy's cache


def test_nvrtc_takes_the_place_of_a_fatbin_that_the_driver_refuses(
    cupy: Cupy, folder: Path, nvcc: Callable[[str, str], None]
) -> None:
    nvcc("sm_90", WRITES)
    fatbin.build(folder, folder)
    cupy.broken = {"path": "driver too old"}
    assert cuda_loader.unavailable() is None
    assert [set(module) for module in cupy.modules] == [{"path"}, {"code", "options"}]
    cupy.broken |= {"code": "no NVRTC"}
    cuda_loader._load.cache_clear()
    assert cuda_loader.unavailable() == (
        "the fatbin does not load (driver too old), and NVRTC does not compile the kernels "
        "either: no NVRTC"
    )


def test_a_launch_passes_pointers_and_ints_on_the_current_stream(
    cupy: Cupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy.broken = {}
    monkeypatch.setattr(cuda_loader, "_gpu", lambda device: torch.device("cuda", 0))
    stream = types.SimpleNamespace(cuda_stream=1234)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    t = torch.zeros(3)
    cuda_loader.launch("jacobi_svd_float32", 5, 64, 1000, (t, t), (7, 40))
    (launch,) = cupy.launches
    assert cupy.streams == [(0, 1234)]
    assert (launch["name"], launch["grid"], launch["block"]) == ("jacobi_svd_float32", (5,), (64,))
    assert launch["shared"] == 1000
    assert launch["arguments"] == (t.data_ptr(), t.data_ptr(), 7, 40)
    assert [value.dtype.name for value in launch["arguments"][2:]] == ["int32", "int32"]
    assert launch["kernel"].max_dynamic_shared_size_bytes == 232448


def test_a_backend_that_cannot_run_raises_where_it_was_asked_for_and_else_falls_back(
    cupy: Cupy,
) -> None:
    reason = "backend 'cuda' cannot run here: no fatbin was built, and NVRTC"
    with pytest.raises(BackendError, match=reason), use_backend("cuda"):
        pass
    assert "NVRTC" in (kernels.available_backends("batched_svd")["cuda"] or "")
    found = kernels._implementation("batched_svd", torch.device("cuda"))
    assert found is kernels.reference.batched_svd
    cupy.broken = {}
    kernels._no_cuda.cache_clear()
    found = kernels._implementation("batched_svd", torch.device("cuda"))
    assert found is kernels._TABLE[("batched_svd", "cuda")]


def test_tensors_on_a_cpu_are_refused(cupy: Cupy) -> None:
    cupy.broken = {}
    with use_backend("cuda"), pytest.raises(BackendError, match="needs tensors on a GPU"):
        batched_svd(torch.zeros(2, 3, 3))


def test_the_doctor_says_what_was_compiled(
    cupy: Cupy, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from corda_kernels.cli.doctor import doctor

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    record = fatbin.Build("", failure="nvcc failed at installation: why")
    (folder / fatbin.RECORD).write_text(json.dumps(record._asdict()))
    doctor()
    lines = capsys.readouterr().out.splitlines()
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
    assert shown["CUDA kernels"] == f"not compiled: {record.failure}"
    assert shown["backend cuda"].startswith(f"no: {record.failure}, and NVRTC")
