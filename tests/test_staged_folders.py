"""A folder is written whole or not at all, beside files of others, threads and processes."""

from __future__ import annotations

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

import pytest
from test_outputs import full_disk, left_behind, names

from corda_kernels import outputs
from corda_kernels.errors import OutputError
from corda_kernels.files import write_json
from corda_kernels.outputs import (
    atomic_path,
    check_output,
    staged_folder,
    temporary_folder,
)

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
