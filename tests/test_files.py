from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from corda_kernels import files
from corda_kernels.errors import CovarianceFileError, OutputError
from corda_kernels.files import (
    atomic_path,
    check_output,
    digest,
    filled_folder,
    format_bytes,
    read_checked,
    temporary_folder,
    write_checked,
    write_json,
    write_tensors,
)

WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, {"a": 1}),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(3)}, {}),
}


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file_as_parent(tmp_path: Path) -> Path:
    """A path that even a superuser cannot write: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "result"


def test_check_output_makes_the_parent_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    assert check_output(str(path)) == path
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == []


def test_check_output_leaves_an_existing_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("before")
    check_output(path, needed_bytes=1)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("exists", [True, False])
def test_check_output_of_a_folder_leaves_it_as_it_was(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "adapter"
    if exists:
        path.mkdir()
    check_output(path, folder=True)
    assert path.exists() == exists


@pytest.mark.parametrize("folder", [True, False])
def test_check_output_refuses_a_path_of_the_other_kind(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "taken"
    path.write_text("") if folder else path.mkdir()
    with pytest.raises(OutputError, match=r"taken is a (file|folder) already"):
        check_output(path, folder=folder)


@pytest.mark.parametrize("write", [*WRITERS.values(), check_output], ids=[*WRITERS, "check"])
def test_a_pipe_is_refused_and_stays(tmp_path: Path, write: Callable[[Path], None]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OutputError, match=r"(pipe|link) is a device or a pipe already: choose"):
            write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "pipe"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_behind_a_link_is_written(
    tmp_path: Path, write: Callable[[Path], None], exists: bool
) -> None:
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "result").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "result")
    write(check_output(tmp_path / "link"))
    write(tmp_path / "plain")
    assert (tmp_path / "disk" / "result").read_bytes() == (tmp_path / "plain").read_bytes()
    assert names(tmp_path) == ["disk", "link", "plain"]
    assert names(tmp_path / "disk") == ["result"]


@pytest.mark.parametrize("folder", [True, False])
def test_check_output_refuses_what_cannot_be_written(file_as_parent: Path, folder: bool) -> None:
    with pytest.raises(OutputError, match=r"cannot write to .*choose another output path"):
        check_output(file_as_parent, folder=folder)


def test_check_output_refuses_a_disk_with_too_little_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    check_output(tmp_path / "result", needed_bytes=1024)
    with pytest.raises(OutputError, match=r"needs about 2.0 KiB, but only 1.0 KiB is free"):
        check_output(tmp_path / "result", needed_bytes=2048)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_is_filled_with_all_files_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    path = tmp_path / "folder"
    if exists:
        path.mkdir()
        (path / "kept").touch()

    def fill(error: Exception | None = None) -> None:
        with filled_folder(path, last="a") as folder:
            assert names(folder) == []
            for name in ("a", "b", "c/d"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
            if error is not None:
                raise error

    for error, expected in ((KeyError(), KeyError), (OSError(errno.ENOSPC, "full"), OutputError)):
        with pytest.raises(expected):
            fill(error)
        assert names(tmp_path) == (["folder"] if exists else [])
        assert not exists or names(path) == ["kept"]
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: moved.append(Path(new).name) or replace(old, new)
    )
    fill()
    assert sorted(moved) == ["a", "b", "d"]
    assert moved[-1] == "a"
    assert names(path) == ["a", "b", "c", *(["kept"] if exists else [])]
    assert (path / "c" / "d").read_text() == "c/d"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_written_file_has_the_mode_of_any_new_file(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    umask = os.umask(0o027)
    try:
        write(tmp_path / "result")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == 0o640


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writing_replaces_the_file_and_leaves_nothing_else(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "new" / "result"
    write(path)
    once = path.read_bytes()
    path.write_text("something else")
    write(path)
    assert path.read_bytes() == once
    assert names(path.parent) == ["result"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_path_that_cannot_be_written_is_named(
    file_as_parent: Path, write: Callable[[Path], None]
) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*file/result"):
        write(file_as_parent)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_old_file_survives_a_failing_replacement(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        write(path)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(errno.ENOSPC, "full"), OutputError), (KeyError(), KeyError)]
)
def test_the_old_file_survives_an_error_while_writing(
    tmp_path: Path, error: Exception, expected: type[Exception]
) -> None:
    path = tmp_path / "result"
    path.write_text("before")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(expected):
        write_half()
    assert path.read_text() == "before"
    assert names(tmp_path) == ["result"]


def test_a_full_disk_that_safetensors_reports_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_tensors(tmp_path / "result", {}, {})


def test_a_temporary_folder_starts_empty_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result"
    left = tmp_path / "new" / ".result.pieces"
    left.mkdir(parents=True)
    (left / "0").touch()  # of a run that was killed
    for failing in (False, True):
        with contextlib.suppress(KeyError), temporary_folder(path) as folder:
            assert names(folder) == []
            (folder / "0").touch()
            if failing:
                raise KeyError
        assert names(path.parent) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="cannot write beside"),
        temporary_folder(tmp_path / "file" / "x"),
    ):
        pass


CHECKED = {"what": "kind of", "error": CovarianceFileError, "remedy": "make it again"}


def test_equal_contents_make_equal_files_in_every_process(tmp_path: Path) -> None:
    code = """
import sys, torch
from corda_kernels.files import write_checked
write_checked(sys.argv[1], "f/1", {"a": "σ", "b": [1]}, {"x": torch.ones(3), "y": torch.zeros(2)})
"""
    for number in range(3):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(number))], check=True)
    first, *others = (path.read_bytes() for path in tmp_path.iterdir())
    assert others == [first, first]
    header, tensors = read_checked(tmp_path / "0", "f/1", **CHECKED)
    assert header == {"a": "σ", "b": [1]}
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"x": 3, "y": 2}


def test_a_file_of_another_format_is_refused_by_its_name(tmp_path: Path) -> None:
    write_checked(tmp_path / "a", "f/1", {}, {})
    with pytest.raises(CovarianceFileError, match=r"not a kind of file .*'f/1', expected 'f/2'"):
        read_checked(tmp_path / "a", "f/2", **CHECKED)
    with pytest.raises(CovarianceFileError, match="absent: no such kind of file"):
        read_checked(tmp_path / "absent", "f/2", **CHECKED)


def test_json_keeps_letters_and_order(tmp_path: Path) -> None:
    write_json(tmp_path / "result", {"σ": [1, 2], "a": None})
    text = (tmp_path / "result").read_text(encoding="utf-8")
    assert text == json.dumps({"σ": [1, 2], "a": None}, indent=2, ensure_ascii=False) + "\n"


def test_tensors_can_be_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4)}
    write_tensors(tmp_path / "result", tensors, {"note": "σ"})
    found = load_file(tmp_path / "result")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_digest_is_of_the_contents_alone() -> None:
    x = torch.randn(4, 6)
    assert digest({"a": x, "b": x[0]}) == digest({"b": x[0].clone(), "a": x.T.contiguous().T})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,)])
def test_digest_takes_any_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert len(digest({"a": torch.zeros(shape, dtype=dtype)})) == 64


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"a": torch.zeros(4)}, "other"),
        ({"b": torch.zeros(4)}, ""),
        ({"a": torch.zeros(2, 2)}, ""),
        ({"a": torch.zeros(4, dtype=torch.int32)}, ""),
        ({"a": -torch.zeros(4)}, ""),
        ({"a": torch.zeros(4), "b": torch.zeros(0)}, ""),
        ({}, ""),
    ],
)
def test_digest_tells_apart(tensors: dict[str, torch.Tensor], text: str) -> None:
    assert digest(tensors, text) != digest({"a": torch.zeros(4)})


def test_digest_survives_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 3), "b": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert digest(load_file(tmp_path / "x.safetensors"), "t") == digest(tensors, "t")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (2**30, "1.0 GiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_bytes_are_written_in_the_largest_fitting_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text
