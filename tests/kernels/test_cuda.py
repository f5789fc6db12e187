"""Loading and launching the CUDA kernels, and what is said where they cannot; CuPy is a double."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from corda_kernels import kernels
from corda_kernels.errors import BackendError
from corda_kernels.kernels import batched_svd, cuda, use_backend


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, from which the kernels are loaded."""
    copy = tmp_path / "csrc"
    shutil.copytree(cuda.sources(), copy)
    monkeypatch.setattr(cuda, "sources", lambda: copy)
    return copy


class Cupy(types.ModuleType):
    """What is used of CuPy. `broken`: what NVRTC says."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.broken: str | None = None
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
        return types.SimpleNamespace(get_function=self._function)

    def _function(self, name: str) -> Any:
        if self.broken is not None:
            raise RuntimeError(self.broken)
        cupy = self

        class Kernel:
            max_dynamic_shared_size_bytes = 0

            def __call__(self, grid: Any, block: Any, arguments: Any, shared_mem: int) -> None:
                launch = {"name": name, "grid": grid, "block": block, "arguments": arguments}
                cupy.launches.append(launch | {"shared": shared_mem, "kernel": self})

        return Kernel()


def forget() -> None:
    for cached in (cuda._load, cuda.shared_memory, cuda.unavailable):
        cached.cache_clear()


@pytest.fixture
def cupy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cupy]:
    """A GPU of compute capability 9.0 with CuPy and NVRTC."""
    double = Cupy()
    double.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "cupy", double)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    forget()
    yield double
    forget()


def test_no_gpu(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable() == "there is no CUDA device"


def test_an_early_gpu(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert cuda.unavailable() == "compute capability 8.0 is needed, the device has 7.5"


def test_no_cupy(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda.unavailable() == "CuPy is not installed: pip install 'corda_kernels[cuda]'"


def test_a_broken_cupy(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert (cuda.unavailable() or "").startswith("CuPy cannot be loaded: import of cupy")


def test_no_sources(cupy: Cupy, folder: Path) -> None:
    shutil.rmtree(folder)
    reason = cuda.unavailable() or ""
    assert reason.startswith("the CUDA sources are missing")


def test_nvrtc_is_missing_or_refuses(cupy: Cupy) -> None:
    cupy.broken = "libnvrtc.so.13 was not found\nin many places"
    reason = "NVRTC does not compile the CUDA kernels: libnvrtc.so.13 was not found"
    assert cuda.unavailable() == reason
    # The answer is kept: no dispatch compiles again.
    cupy.broken = None
    assert cuda.unavailable() == reason


def test_nvrtc_compiles_once_and_again_when_an_included_file_has_changed(
    cupy: Cupy, folder: Path
) -> None:
    assert cuda.unavailable() is None
    (module,) = cupy.modules
    assert module["code"] == (folder / "kernels.cu").read_text(encoding="utf-8")
    assert f"-I{folder}" in module["options"]
    before = module["options"]
    for text in (None, "// later"):
        if text is not None:
            (folder / "block.cuh").write_text(text)
        forget()
        assert cuda.unavailable() is None
        # The same options find what is in CuPy's cache, others are another entry of it.
        assert (cupy.modules[-1]["options"] == before) == (text is None)


def test_a_launch_passes_pointers_and_ints_on_the_current_stream(
    cupy: Cupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_gpu", lambda device: torch.device("cuda", 0))
    stream = types.SimpleNamespace(cuda_stream=1234)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    t = torch.zeros(3)
    cuda.launch("jacobi_svd_float32", 5, 64, 1000, (t, t), (7, 40))
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
    cupy.broken = "no NVRTC"
    reason = "backend 'cuda' cannot run here: NVRTC does not compile the CUDA kernels: no NVRTC"
    with pytest.raises(BackendError, match=reason), use_backend("cuda"):
        pass
    assert reason.endswith(kernels.available_backends("batched_svd")["cuda"] or "nothing")
    found = kernels._implementation("batched_svd", torch.device("cuda"))
    assert found is kernels.reference.batched_svd
    cupy.broken = None
    forget()
    found = kernels._implementation("batched_svd", torch.device("cuda"))
    assert found is cuda.batched_svd


def test_tensors_on_a_cpu_are_refused(cupy: Cupy) -> None:
    with use_backend("cuda"), pytest.raises(BackendError, match="needs tensors on a GPU"):
        batched_svd(torch.zeros(2, 3, 3))


def test_the_doctor_says_why_a_backend_does_not_run(
    cupy: Cupy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from corda_kernels.cli.doctor import doctor

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    cupy.broken = "no NVRTC"
    doctor()
    lines = capsys.readouterr().out.splitlines()
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
    assert shown["backend cuda"] == "no: NVRTC does not compile the CUDA kernels: no NVRTC"
