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

AnyPath = str | os.PathLike[str]

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


def check_output(path: AnyPath, *, needed_bytes: int = 0, folder: bool = False) -> Path:
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
    with _writing(path, folder=folder) as (_, temporary):
        free = shutil.disk_usage(temporary.parent).free
    if free < needed_bytes:
        needed = f"{format_bytes(needed_bytes)}, but only {format_bytes(free)} is free there"
        remedy = "free some space or choose another output path"
        raise OutputError(f"{path} needs about {needed}: {remedy}")
    return Path(path)


@contextlib.contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """Yields an empty file, which replaces `path` if the block ends without error.

    The file has the mode that any new file has here, however the block writes it (safetensors
    alone would make it readable to its owner only). Of a symbolic link, the target is replaced.

    Raises:
        OutputError: the path is a folder, a device or a pipe, or the file cannot be written or
            moved into place.
    """
    with _writing(path) as (target, temporary):
        mode = temporary.stat().st_mode
        yield temporary
        _settle(temporary, mode)
        os.replace(temporary, target)


@contextlib.contextmanager
def staged_folder(path: AnyPath, *, replaced: re.Pattern[str]) -> Iterator[Path]:
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
    with _writing(path, folder=True) as (target, temporary):
        mode = temporary.stat().st_mode
        temporary.unlink()
        fresh = temporary.with_name("new")
        fresh.mkdir()
        yield fresh
        for file in filter(Path.is_file, fresh.rglob("*")):
            _settle(file, mode)
        written = set(fresh.rglob("*"))
        for attempt in range(_ATTEMPTS):
            try:
                if target.exists():
                    _carry_over(target, fresh, replaced)
                    old = _exchange(fresh, target)
                    with contextlib.suppress(FileNotFoundError):  # another writer replaced it
                        _carry_over(old, target, replaced)  # what has appeared there meanwhile
                else:
                    fresh.rename(target)
                break
            except OSError as error:  # it is there, or not there, since another writer put it so
                if error.errno not in (*_TAKEN, errno.ENOENT) or attempt == _ATTEMPTS - 1:
                    raise
                for path in sorted(set(fresh.rglob("*")) - written, reverse=True):
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def temporary_folder(path: AnyPath) -> Iterator[Path]:
    """Yields an empty folder beside the file `path`, on the same disk, which is deleted afterwards.

    Raises:
        OutputError: it cannot be made, or what is written to it cannot.
    """
    with _writing(path) as (_, temporary):
        temporary.unlink()
        yield temporary.parent


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that keeps it at least one: 1536 gives "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextlib.contextmanager
def _writing(path: AnyPath, *, folder: bool = False) -> Iterator[tuple[Path, Path]]:
    """What a rename must replace, and an empty file of its name in a workspace beside it.

    Whatever the system says on the way becomes one error that names the path.
    """
    try:
        target = Path(os.path.realpath(os.fsdecode(path)))  # absolute, and no symbolic link
    except (TypeError, ValueError) as error:  # a number; a NUL byte
        raise OutputError(f"{path!r} cannot be an output path: {error}") from error
    try:
        _check_replaceable(target, folder)
        with _workspace(target.parent) as work:
            (work / target.name).touch()  # the name may be too long
            yield target, work / target.name
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        if not _is_about(error, target):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot write {os.fspath(path)}: {reason}; nothing that was there before has been "
            "changed: choose another output path, or mend permissions or space there"
        ) from error


def _is_about(error: Exception, target: Path) -> bool:
    """Whether an error names the target, something in it or above it, a workspace, or no file.

    A block may also read files, such as offloaded weights, which have nothing to do with these.
    """
    named = getattr(error, "filename", None)
    if not isinstance(named, str | bytes):
        return True
    place = Path(os.path.abspath(os.fsdecode(named)))
    return (
        target.is_relative_to(place)
        or place.is_relative_to(target)
        or any(part.startswith(_PREFIX) for part in place.parts)
    )


def _check_replaceable(path: Path, folder: bool) -> None:
    """Refuses what is of the other kind, and folders that cannot be replaced by a rename (mount
    points, the current folder)."""
    kind = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"
    if path.exists() and kind != ("a folder" if folder else "a file"):
        raise OutputError(f"{path} is {kind} already: choose another output path")
    if folder and os.path.ismount(path):
        raise OutputError(f"{path} is a disk's own folder: choose a folder in it")
    if folder and Path.cwd().is_relative_to(path):
        raise OutputError(f"{path} is the current folder or holds it: choose another output path")
    if folder and path.exists() and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def _workspace(home: Path) -> Iterator[Path]:
    """An empty folder in `home` that only this writer uses; it deletes those that kills left."""
    if not home.exists():
        home.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
        lock = FileLock(folder / _LOCK, timeout=0)
        try:
            # Until the lock is held, another writer may take the folder for one that a kill has
            # left, and delete it. `acquire` then finds it missing, or takes it for a file.
            with contextlib.suppress(Timeout, FileNotFoundError, FileExistsError):
                lock.acquire()
                if (folder / _LOCK).exists():
                    break
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    try:
        _sweep(home, folder)
        (folder / "work").mkdir()
        yield folder / "work"
    finally:
        _delete(folder)
        lock.release()


def _sweep(home: Path, own: Path) -> None:
    """Deletes the workspaces of this user that no writer holds any more."""
    owner = own.lstat().st_uid
    for left in home.glob(f"{_PREFIX}*"):
        # Its writer may be at work, or others delete it too: no reason to fail this writer.
        with contextlib.suppress(OSError):
            found = left.lstat()
            if left == own or not stat.S_ISDIR(found.st_mode) or found.st_uid != owner:
                continue
            if (left / _LOCK).is_file():
                with FileLock(left / _LOCK, timeout=0):
                    _delete(left)
            else:
                left.rmdir()  # killed before there was a lock


def _delete(workspace: Path) -> None:
    """Deletes a workspace; a folder that waits in it and is missing in its place goes back there.

    What cannot be deleted is left to the next writer.
    """
    for parked in workspace.glob(f"work/{_PARKED}*/*"):
        place = workspace.parent / parked.name
        try:
            if not place.exists():
                parked.rename(place)
        except OSError as error:
            if error.errno not in _TAKEN:  # else another writer has put its own there meanwhile
                raise
    shutil.rmtree(workspace / "work", ignore_errors=True)
    shutil.rmtree(workspace, ignore_errors=True)  # the lock last: by it the rest is known


def _settle(file: Path, mode: int) -> None:
    """Gives a written file its mode, and waits until the disk has it."""
    file.chmod(stat.S_IMODE(mode))
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def _carry_over(old: Path, new: Path, replaced: re.Pattern[str] | None) -> None:
    """Links what else a folder holds into the one that replaces it, and gives that its mode.

    Of a folder within it that the new one does not have, everything is kept.
    """
    for entry in list(old.iterdir()):
        beside, is_folder = new / entry.name, entry.is_dir() and not entry.is_symlink()
        there = beside.exists()
        if entry.name.startswith(_PREFIX):
            continue
        if there and is_folder != beside.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{entry.name} in it is of another kind")
        if is_folder:
            beside.mkdir(exist_ok=True)
            _carry_over(entry, beside, replaced if there else None)
        elif not there and (replaced is None or not replaced.fullmatch(entry.name)):
            try:
                os.link(entry, beside, follow_symlinks=False)
            except OSError:  # a disk that gives a file no second name
                shutil.copy2(entry, beside, follow_symlinks=False)
    shutil.copymode(old, new)


def _exchange(fresh: Path, target: Path) -> Path:
    """Swaps two folders in one step, or in two where the system knows no better.

    Returns:
        Where the old one is now.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        names = os.fsencode(fresh), os.fsencode(target)
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return fresh
        code = ctypes.get_errno()
        if code not in _CANNOT_EXCHANGE:
            raise OSError(code, os.strerror(code), str(target))
    parked = Path(tempfile.mkdtemp(prefix=_PARKED, dir=fresh.parent))
    old = target.rename(parked / target.name)
    fresh.rename(target)
    return old
