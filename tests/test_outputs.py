"""Outputs are checked before the work, and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock, Timeout

from corda_kernels.errors import OutputError
from corda_kernels.files import write_json, write_tensors
from corda_kernels.outputs import (
    atomic_path,
    check_output,
    format_bytes,
    staged_folder,
    temporary_folder,
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
    with pytest.raises(OutputError, match=r"cannot write .*choose another output path"):
        check_output(file_as_parent, folder=folder)


def test_check_output_refuses_a_disk_with_too_little_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    check_output(tmp_path / "result", needed_bytes=1024)
    with pytest.raises(OutputError, match=r"needs about 2.0 KiB, but only 1.0 KiB is free"):
        check_output(tmp_path / "result", needed_bytes=2048)


def test_a_disk_without_room_for_a_lock_is_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileLock, "acquire", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        check_output(tmp_path / "result")
    assert names(tmp_path) == []


def left_behind(home: Path, name: str = ".corda-killed") -> Path:
    """A workspace as a kill leaves it."""
    (home / name / "work" / "new").mkdir(parents=True)
    (home / name / "lock").touch()
    (home / name / "work" / "new" / "file").touch()
    return home / name


@pytest.mark.parametrize("write", [*WRITERS.values(), check_output], ids=[*WRITERS, "check"])
def test_the_next_writer_deletes_what_a_kill_left(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    left_behind(tmp_path)
    (tmp_path / ".corda-killed-early").mkdir()
    write(tmp_path / "result")
    assert names(tmp_path) == ([] if write is check_output else ["result"])


def test_only_what_is_left_behind_is_deleted(tmp_path: Path) -> None:
    elsewhere = left_behind(tmp_path / "elsewhere")
    home = tmp_path / "home"
    at_work = left_behind(home, ".corda-at-work")
    (home / ".corda-link").symlink_to(elsewhere)
    (home / ".corda-of-somebody").mkdir()
    (home / ".corda-of-somebody" / "file").touch()
    (home / ".corda-file").touch()
    before = names(home)
    with FileLock(at_work / "lock"):
        check_output(home / "result")
    assert names(home) == before
    assert (elsewhere / "work" / "new" / "file").exists()


def test_a_workspace_that_another_writer_is_deleting_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has its lock: what was written there would be deleted under the writer."""
    acquire, refused = FileLock.acquire, []

    def once(self: FileLock, *arguments: object, **options: object) -> object:
        if not refused:
            Path(self.lock_file).touch()
            refused.append(Path(self.lock_file).parent)
            raise Timeout(self.lock_file)
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(FileLock, "acquire", once)
    with atomic_path(tmp_path / "result") as temporary:
        assert refused[0] not in temporary.parents
        temporary.write_text("whole")
    assert names(tmp_path) == ["result"]


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


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_the_disk_has_every_file_before_it_takes_its_place(
    tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave the new name with nothing behind it."""
    target = tmp_path / "result"
    on_disk = set()

    def note(descriptor: int) -> None:
        assert not target.exists()
        on_disk.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    if folder:
        with staged_folder(target, replaced=re.compile("a|b")) as fresh:
            for name in ("a", "b"):
                (fresh / name).write_text(name)
    else:
        write_json(target, {})
    files = [target / "a", target / "b"] if folder else [target]
    assert on_disk == {file.stat().st_ino for file in files}


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


def test_a_temporary_folder_starts_empty_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result"
    for failing in (False, True):
        with contextlib.suppress(KeyError), temporary_folder(path) as folder:
            assert names(folder) == []
            (folder / "0").touch()
            if failing:
                raise KeyError
        assert names(path.parent) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="cannot write"),
        temporary_folder(tmp_path / "file" / "x"),
    ):
        pass


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
