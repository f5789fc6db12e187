"""Writing results safely: paths are checked before the work, files appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from corda_kernels.errors import CordaError, OutputError

# The one entry of a checked file's metadata. There is only one because safetensors writes several
# in an order that differs from run to run, and equal contents should make equal files.
_SEAL = "corda"


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
    path = Path(path)
    _check_kind(path, folder=folder)
    home = path if folder else _behind_links(path).parent
    existed = home.exists()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home, prefix=".corda-write-test-"):
            pass
        free = shutil.disk_usage(home).free
        if folder and not existed:
            home.rmdir()
    except OSError as error:
        raise OutputError(
            f"cannot write to {home}: {error.strerror or error}; choose another output path or "
            "mend its permissions"
        ) from error
    if free < needed_bytes:
        raise OutputError(
            f"{path} needs about {format_bytes(needed_bytes)}, but only {format_bytes(free)} is "
            "free there: free some space or choose another output path"
        )
    return path


def _check_kind(path: Path, *, folder: bool) -> None:
    if not path.exists() or (path.is_dir() if folder else path.is_file()):
        return
    kind = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"
    raise OutputError(f"{path} is {kind} already: choose another output path")


def _behind_links(path: str | os.PathLike[str]) -> Path:
    """What a symbolic link leads to; a path that is none, as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty file beside `path`, which replaces `path` if the block ends without error.

    The file has the mode that any new file has here, however the block writes it (safetensors
    alone would make it readable to its owner only). Of a symbolic link, the target is replaced.

    Raises:
        OutputError: the path is a folder, a device or a pipe, or the file cannot be written or
            moved into place.
    """
    path = _behind_links(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _check_kind(path, folder=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot write {path}: {reason}; nothing that was there before has been changed"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def temporary_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder beside `path`, on the same disk, which is deleted afterwards.

    It has the same name every time, so that what a kill leaves behind is gone after the next run.

    Raises:
        OutputError: it cannot be made.
    """
    path = _behind_links(path)
    folder = path.with_name(f".{path.name}.pieces")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"cannot write beside {path}: {error.strerror or error}; choose another output path"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def filled_folder(path: str | os.PathLike[str], *, last: str) -> Iterator[Path]:
    """Yields an empty folder, whose files move to `path` if the block ends without error.

    Other files in `path` stay. If it was not there, it is not there after an error either.

    Args:
        path: a folder.
        last: the file that moves last: where it is, all are.

    Raises:
        OutputError: the files cannot be moved into place.
    """
    path = Path(path)
    existed = path.exists()
    try:
        with temporary_folder(path / last) as folder:  # inside: on the same disk, if it is one
            yield folder
            files = [file for file in folder.rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: file == folder / last):
                target = path / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}: {error.strerror or error}; free some space or choose another "
            "output path"
        ) from error
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # it is not empty, as it should be
                path.rmdir()


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes `value` as indented JSON, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """`value` as indented JSON in UTF-8, the contents of a file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_bytes(path: str | os.PathLike[str], contents: bytes) -> None:
    """Writes a file of these contents, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(contents)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, atomically.

    Args:
        path: the file.
        tensors: contiguous tensors on any device that do not share memory.
        metadata: string metadata for the file's header.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        save_file(dict(tensors), str(temporary), metadata=dict(metadata))


def write_checked(
    path: str | os.PathLike[str],
    format_: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes a safetensors file with a JSON header and a checksum over all of it, atomically.

    Equal contents make equal files, byte for byte.

    Args:
        path: the file.
        format_: name and version of what the file holds.
        header: a JSON object.
        tensors: as for `write_tensors`.

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps(header, ensure_ascii=False)
    write_tensors(path, tensors, {_SEAL: "\n".join((format_, digest(tensors, text), text))})


def read_checked(
    path: str | os.PathLike[str], format_: str, *, what: str, error: type[CordaError], remedy: str
) -> tuple[Any, dict[str, Tensor]]:
    """Reads a file that `write_checked` wrote, and verifies its format and checksum.

    Args:
        path: the file.
        format_: which it must have.
        what: kind of file, for messages.
        error: type to raise.
        remedy: what to do about a bad file, for messages.

    Returns:
        The JSON value of its header, and its tensors.

    Raises:
        CordaError: of type `error`: the file is missing, truncated, altered, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path}: no such {what} file")
    try:
        with safe_open(str(path), framework="pt") as file:
            seal = (file.metadata() or {}).get(_SEAL, "").split("\n", 2)
            if seal[0] != format_:
                raise error(
                    f"{path} is a safetensors file, but not a {what} file written by this package "
                    f"(format {seal[0][:40]!r}, expected {format_!r})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as reason:
        raise error(
            f"{path} is truncated or not a safetensors file ({reason}): {remedy}"
        ) from reason
    if len(seal) != 3 or digest(tensors, seal[2]) != seal[1]:
        raise error(
            f"{path}: the contents do not match their checksum; the file was altered or damaged: "
            f"{remedy}"
        )
    try:
        return json.loads(seal[2]), tensors
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: the header is not JSON ({reason}): {remedy}") from reason


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over `text` and every tensor's name, dtype, shape and bytes, ordered by name."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def utf8_name(path: Path) -> str:
    """The last part of a path, to stand in a record: what of it is not UTF-8 is replaced."""
    return os.fsencode(path.name).decode(errors="replace")


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that keeps it at least one: 1536 gives "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
