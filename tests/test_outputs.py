"""Outputs are checked before the work, and written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock, Timeout

from corda_kernels import outputs
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


OURS = re.compile("[ab]|old")


def fill(path: Path, error: BaseException | None = None) -> None:
    with staged_folder(path, replaced=OURS) as folder:
        assert names(folder) == []
        for name in ("a", "b", "c/d"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        if error is not None:
            raise error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an old result and files of others in it."""
    path = tmp_path / "disk" / "folder"
    (path / "c").mkdir(parents=True)
    for name in ("a", "old", "notes", "c/kept"):
        (path / name).write_text("before")
    (path / "link").symlink_to("notes")
    return path


@pytest.fixture
def _two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot swap two folders in one step."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), OutputError),
        (KeyError(), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_error_leaves_a_folder_as_it_was(
    folder: Path, error: BaseException, expected: type[BaseException]
) -> None:
    before = names(folder)
    for path, there in ((folder, ["folder"]), (folder.with_name("new"), ["folder"])):
        with pytest.raises(expected):
            fill(path, error)
        assert names(folder.parent) == there
        assert names(folder) == before


@pytest.mark.parametrize("swap", ["one step", "_two_steps"])
def test_a_folder_replaces_its_own_files_and_keeps_others(
    folder: Path, swap: str, request: pytest.FixtureRequest
) -> None:
    if swap != "one step":
        request.getfixturevalue(swap)
    notes = (folder / "notes").stat().st_ino
    folder.chmod(0o750)
    fill(folder)
    assert names(folder) == ["a", "b", "c", "link", "notes"]
    assert names(folder / "c") == ["d", "kept"]
    assert (folder / "a").read_text() == "a"
    assert (folder / "notes").stat().st_ino == notes
    assert os.readlink(folder / "link") == "notes"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert names(folder.parent) == ["folder"]
    fill(folder.with_name("new"))
    assert names(folder.with_name("new")) == ["a", "b", "c"]


@pytest.mark.parametrize("swap", ["one step", "_two_steps"])
def test_what_others_write_while_a_folder_is_replaced_stays(
    folder: Path, swap: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that appears just before the exchange, and one that is written anew after a failed
    one."""
    if swap != "one step":
        request.getfixturevalue(swap)
    exchange, attempts = outputs._exchange, []

    def meanwhile(fresh: Path, target: Path) -> Path:
        attempts.append(fresh)
        if len(attempts) == 1:
            (target / "notes").unlink()
            (target / "notes").write_text("after")
            shutil.rmtree(target / "c")
            raise OSError(errno.ENOENT, "gone")
        (target / "late").write_text("late")
        return exchange(fresh, target)

    monkeypatch.setattr(outputs, "_exchange", meanwhile)
    fill(folder)
    assert names(folder) == ["a", "b", "c", "late", "link", "notes"]
    assert (folder / "notes").read_text() == "after"
    assert names(folder / "c") == ["d"]
    assert names(folder.parent) == ["folder"]


def test_an_error_about_another_file_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "offloaded").mkdir()
    for open_output in (atomic_path, partial(staged_folder, replaced=OURS), temporary_folder):
        with pytest.raises(FileNotFoundError), open_output(tmp_path / "result"):
            (tmp_path / "offloaded" / "weight.dat").read_bytes()
        with (
            pytest.raises(OutputError, match="cannot write"),
            open_output(tmp_path / "result") as p,
        ):
            (p.parent / "missing" / "file").touch()
    assert names(tmp_path) == ["offloaded"]


def test_a_disk_without_room_for_a_lock_is_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileLock, "acquire", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        check_output(tmp_path / "result")
    assert names(tmp_path) == []


def test_a_disk_without_hard_links_gets_copies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", full_disk)
    fill(folder)
    assert (folder / "notes").read_text() == (folder / "c" / "kept").read_text() == "before"


def test_a_folder_where_there_is_to_be_a_file_is_refused(folder: Path) -> None:
    (folder / "a").unlink()
    (folder / "a").mkdir()
    before = names(folder)
    with pytest.raises(OutputError, match="a in it is of another kind; nothing that was there"):
        fill(folder)
    assert names(folder) == before
    assert names(folder.parent) == ["folder"]


def test_a_folder_behind_a_link_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (folder / "b").read_text() == "b"
    assert names(tmp_path) == ["disk", "link"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="Permission denied"):
        check_output(folder, folder=True)
    monkeypatch.undo()
    monkeypatch.chdir(folder / "c")
    with pytest.raises(OutputError, match="is the current folder or holds it: choose another"):
        check_output(folder, folder=True)
    with pytest.raises(OutputError, match="is a disk's own folder: choose a folder in it"):
        check_output("/", folder=True)


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


def test_a_folder_that_was_being_replaced_in_two_steps_goes_back(tmp_path: Path) -> None:
    parked = left_behind(tmp_path) / "work" / "parked-1" / "result"
    parked.mkdir(parents=True)
    (parked / "a").write_text("before")
    check_output(tmp_path / "another")
    assert names(tmp_path) == ["result"]
    assert (tmp_path / "result" / "a").read_text() == "before"


@pytest.mark.usefixtures("_two_steps")
def test_two_steps_that_fail_in_between_are_undone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        fill(folder)
    assert (folder / "a").read_text() == "before"
    assert names(folder.parent) == ["folder"]


SAVERS: dict[str, Callable[[Path, int], None]] = {
    "file": lambda path, number: write_json(path, {"n": [number] * 5_000}),
    "folder": lambda path, number: save_numbered(path, number),
}


def save_numbered(path: Path, number: int) -> None:
    with staged_folder(path, replaced=re.compile("part-.*")) as folder:
        for part in range(8):
            (folder / f"part-{part}").write_text(str(number))


def saved_number(path: Path) -> int:
    """Whose the result is, all of it."""
    if path.is_file():
        (number,) = set(json.loads(path.read_text())["n"])
    else:
        assert len(names(path)) == 8
        (number,) = {int(part.read_text()) for part in path.iterdir()}
    return number


@pytest.mark.parametrize("swap", ["one step", "_two_steps"])
@pytest.mark.parametrize("kind", SAVERS)
def test_threads_that_save_to_one_path_leave_the_whole_of_one(
    tmp_path: Path, kind: str, swap: str, request: pytest.FixtureRequest
) -> None:
    if swap != "one step":
        request.getfixturevalue(swap)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(8):
            list(pool.map(partial(SAVERS[kind], tmp_path / "result"), range(2)))
            assert saved_number(tmp_path / "result") in range(2)
            assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("kind", SAVERS)
def test_processes_that_save_to_one_path_leave_the_whole_of_one(tmp_path: Path, kind: str) -> None:
    children = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for _ in range(20):
                    SAVERS[kind](tmp_path / "result", number)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert saved_number(tmp_path / "result") in range(2)
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_name_that_passes_the_check_can_be_written(tmp_path: Path, folder: bool) -> None:
    longest = tmp_path / ("x" * 255)
    SAVERS["folder" if folder else "file"](check_output(longest, folder=folder), 0)
    assert saved_number(longest) == 0
    for wrong in (tmp_path / ("x" * 256), "a\0b", 5, None):
        with pytest.raises(OutputError, match="cannot"):
            check_output(wrong, folder=folder)  # type: ignore[arg-type]


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
