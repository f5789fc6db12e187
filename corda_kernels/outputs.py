"""Results on disk: checked before the work, and written whole or not at all.

While a result is written it stands in a workspace beside its place: a folder `.corda-…` of random
name, readable to its owner only, whose lock the writer holds. One rename then puts it into place. A
kill leaves a workspace whose lock is free, and the next writer to the same folder deletes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from corda_kernels.errors import OutputError

_PREFIX = ".corda-"
_LOCK = "lock"
# Where a folder waits that is being replaced, on file systems that need two steps for it.
_PARKED = "parked-"

# How Linux swaps two names in one step, from its header files.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV)
# What a rename to a folder that is there already ends in.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
# Between two attempts others must have replaced the folder too.
_ATTEMPTS = 100


def check_output(
    path: str | os.PathLike[str], *, needed_bytes: int = 0, folder: bool = False
) -> Path:
    """Makes sure, before any work is done, that `path` can be written later.

    The parent folder is created where it is missing; nothing else is left behind.

    Args:
        path: the file (or, with `folder=True`, the folder) that will be written.
        needed_bytes: a lower bound of its size.
        folder: whether `path` is a folder.

    Raises:
        OutputError: the path is of the other kind, a device or a pipe, its parent cannot be
            written, or the disk has too little space.
    """
    with _output_errors(path):
        target = _behind_links(path)
        _check_kind(target, folder=folder)
        if folder:
            _check_replaceable(target)
        with _workspace(target.parent) as work:
            (work / target.name).touch()  # its name may be too long
            free = shutil.disk_usage(work).free
    if free < needed_bytes:
        raise OutputError(
            f"{path} needs about {format_bytes(needed_bytes)}, but only {format_bytes(free)} is "
            "free there: free some space or choose another output path"
        )
    return Path(path)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty file, which replaces `path` if the block ends without error.

    The file has the mode that any new file has here, however the block writes it (safetensors
    alone would make it readable to its owner only). Of a symbolic link, the target is replaced.

    Raises:
        OutputError: the path is a folder, a device or a pipe, or the file cannot be written or
            moved into place.
    """
    with _output_errors(path):
        target = _behind_links(path)
        _check_kind(target, folder=False)
        with _workspace(target.parent) as work:
            temporary = work / target.name
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            _settle(temporary, mode)
            os.replace(temporary, target)


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike[str], *, replaced: re.Pattern[str]) -> Iterator[Path]:
    """Yields an empty folder, which takes the place of `path` if the block ends without error.

    What else `path` holds is in the new folder too: its files by hard links, where the disk has
    them, so that nothing is read and nothing is ever missing.

    Args:
        path: a folder, there already or not.
        replaced: names of files that are parts of what is written, and do not outlive it.

    Raises:
        OutputError: the folder cannot be written or moved into place, or it holds a folder where
            there is to be a file. What was there is as it was.
    """
    with _output_errors(path):
        target = _behind_links(path)
        _check_kind(target, folder=True)
        _check_replaceable(target)
        with _workspace(target.parent) as work:
            fresh = work / "new"
            fresh.mkdir()
            (work / "mode").touch()
            mode = stat.S_IMODE((work / "mode").stat().st_mode)
            yield fresh
            for file in fresh.rglob("*"):
                if file.is_file():
                    _settle(file, mode)
            _take_over(target, fresh, replaced)
            _put_into_place(fresh, target)


@contextlib.contextmanager
def temporary_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder beside `path`, on the same disk, which is deleted afterwards.

    Raises:
        OutputError: it cannot be made, or what is written to it cannot.
    """
    with _output_errors(path), _workspace(_behind_links(path).parent) as work:
        (work / "new").mkdir()
        yield work / "new"


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that keeps it at least one: 1536 gives "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextlib.contextmanager
def _output_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the system says about a path into one error that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot write {os.fspath(path)}: {reason}; nothing that was there before has been "
            "changed: choose another output path, or mend permissions or space there"
        ) from error


def _behind_links(path: str | os.PathLike[str]) -> Path:
    """The path that a rename must replace: absolute, and no symbolic link."""
    try:
        return Path(os.path.realpath(os.fsdecode(path)))
    except (TypeError, ValueError) as error:  # a number; a NUL byte
        raise OutputError(f"{path!r} cannot be an output path: {error}") from error


def _check_kind(path: Path, *, folder: bool) -> None:
    if not path.exists() or (path.is_dir() if folder else path.is_file()):
        return
    kind = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"
    raise OutputError(f"{path} is {kind} already: choose another output path")


def _check_replaceable(folder: Path) -> None:
    """Refuses folders that no rename can put another in the place of."""
    if os.path.ismount(folder):
        raise OutputError(f"{folder} is a disk's own folder: choose a folder in it")
    if Path.cwd().is_relative_to(folder):
        raise OutputError(
            f"{folder} is the current folder or holds it: choose another, for it is replaced whole"
        )
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def _workspace(home: Path) -> Iterator[Path]:
    """An empty folder in `home` of this writer alone; those that kills have left are deleted."""
    if home.exists() and not home.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    home.mkdir(parents=True, exist_ok=True)
    folder, lock = _claimed(home)
    try:
        _sweep(home, folder)
        work = folder / "work"
        work.mkdir()
        yield work
    finally:
        _delete(folder)
        lock.release()


def _claimed(home: Path) -> tuple[Path, FileLock]:
    """A new workspace and its lock, held."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
        lock = FileLock(folder / _LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):
            continue  # another writer takes it for left behind, and is deleting it
        except NotImplementedError:
            return folder, lock  # a disk without locks, on which nobody sweeps either
        if (folder / _LOCK).exists():  # else it was deleted between the two
            return folder, lock


def _sweep(home: Path, own: Path) -> None:
    """Deletes the workspaces of this user that no writer holds any more."""
    owner = own.lstat().st_uid
    for left in home.glob(f"{_PREFIX}*"):
        try:
            found = left.lstat()
            if left == own or not stat.S_ISDIR(found.st_mode) or found.st_uid != owner:
                continue
            if not (left / _LOCK).is_file():
                left.rmdir()  # killed before there was a lock; else it is somebody else's
                continue
            with FileLock(left / _LOCK, timeout=0):
                _delete(left)
        except (Timeout, NotImplementedError):
            continue  # its writer is at work, or nobody can tell
        except OSError:
            continue  # not empty, or another writer sweeps too: no reason to fail this one


def _delete(workspace: Path) -> None:
    """Deletes a workspace; a folder that waits in it and is missing in its place goes back there.

    What cannot be deleted is left to the next writer.
    """
    for parked in workspace.glob(f"work/{_PARKED}*/*"):
        place = workspace.parent / parked.name
        if not place.exists():
            try:
                parked.rename(place)
            except OSError as error:
                if error.errno not in _TAKEN:  # else another writer has put its own there meanwhile
                    raise
    shutil.rmtree(workspace / "work", ignore_errors=True)
    shutil.rmtree(workspace, ignore_errors=True)  # the lock last: by it the rest is known


def _settle(file: Path, mode: int) -> None:
    """Gives a written file its mode, and waits until the disk has it."""
    file.chmod(mode)
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def _take_over(old: Path, new: Path, replaced: re.Pattern[str]) -> None:
    """Gives a folder the mode and the other files of the one that it replaces, if there is one."""
    for _ in range(_ATTEMPTS):
        if not old.exists():
            return
        try:
            _carry_over(old, new, replaced)
            shutil.copymode(old, new)
            return
        except FileNotFoundError:  # another writer has replaced it meanwhile
            continue
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _carry_over(old: Path, new: Path, replaced: re.Pattern[str]) -> None:
    """Links the files of one folder into another that is to replace it."""
    for entry in list(old.iterdir()):
        beside = new / entry.name
        is_folder = entry.is_dir() and not entry.is_symlink()
        if entry.name.startswith(_PREFIX):
            continue
        if beside.exists():
            if is_folder != beside.is_dir():
                raise FileExistsError(errno.EEXIST, f"{entry.name} in it is of another kind")
            if is_folder:
                _carry_over(entry, beside, replaced)
        elif is_folder:
            shutil.copytree(entry, beside, symlinks=True, copy_function=_link)
        elif not replaced.fullmatch(entry.name):
            _link(str(entry), str(beside))


def _link(file: str, other: str) -> None:
    """A second name for a file; a copy where the disk has no such thing."""
    try:
        os.link(file, other, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, other, follow_symlinks=False)


def _put_into_place(fresh: Path, target: Path) -> None:
    """Renames a folder to `target`; what was there is afterwards somewhere beside `fresh`."""
    for _ in range(_ATTEMPTS):
        for put in (os.rename, _exchange):  # the first if there is nothing yet, or nothing in it
            try:
                put(fresh, target)
                return
            except OSError as error:  # it is there, or not there, since another writer put it so
                if error.errno not in (*_TAKEN, errno.ENOENT):
                    raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _exchange(fresh: Path, target: Path) -> None:
    """Swaps two folders in one step, or in two where the system knows no better."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        names = os.fsencode(fresh), os.fsencode(target)
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _CANNOT_EXCHANGE:
            raise OSError(code, os.strerror(code), str(target))
    parked = Path(tempfile.mkdtemp(prefix=_PARKED, dir=fresh.parent))
    target.rename(parked / target.name)
    fresh.rename(target)
