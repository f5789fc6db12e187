"""Files and other sources of text → texts and records.

A JSON line is parsed only when its turn comes. Tables and the hub are read by the library datasets.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from corda_kernels.arguments import readable_path, shown
from corda_kernels.errors import DataError, MissingExtraError, first_line
from corda_kernels.outputs import atomic_path

# What `read_texts` and `token_batches` take.
Data = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]
T = TypeVar("T")
_STDIN = "-"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# Standard input has no name that tells: an object or an array of objects or strings begins so.
_JSON = re.compile(r"\s*(\{\s*\"|\[\s*[{\"])")
# A data set on the hub: its name, a configuration if it has several, a split or a slice of one.
_HUB = re.compile(r"([^:]+)(?::([^:\[\]]+))?:([\w.+]+(?:\[.*\])?)")


class _Line(NamedTuple):
    """A line of JSON, parsed when its turn comes."""

    number: int
    text: str


def data_name(data: Data) -> str:
    """What messages call the data."""
    if isinstance(data, str | os.PathLike):
        return "standard input" if os.fspath(data) == _STDIN else str(data)
    return "the data"


def items_of(data: Data, min_chars: int) -> Iterable[Any]:
    """Texts, records, or lines of JSON to be parsed."""
    if not isinstance(data, str | os.PathLike):
        if not isinstance(data, Iterable) or hasattr(data, "keys"):
            raise DataError(
                f"data must be a path, a datasets.Dataset, or texts or records in a list or "
                f"another iterable, got {shown(data)}: of several splits give one, such as "
                'data["train"], of a DataFrame to_dict("records")'
            )
        return data
    path = readable_path(data, DataError)
    hub = None if path.exists() else _HUB.fullmatch(os.fspath(data))
    if hub is not None:
        name, configuration, split = hub.groups()
        return _loaded(name, data_name(data), split=split, name=configuration)
    kind = Path(str(path).lower().removesuffix(".gz")).suffix
    if kind in _TABLES and path.is_file():
        options = {"sep": "\t"} if kind == ".tsv" else {}
        file = glob.escape(os.fspath(path.absolute()))  # datasets takes it for a pattern
        return _loaded(_TABLES[kind], data_name(data), split="train", data_files=file, **options)
    content = _read(path, data_name(data))
    if os.fspath(data) == _STDIN and _JSON.match(content):
        kind = JSON_SUFFIXES[0]
    if kind not in JSON_SUFFIXES:
        return _spans(content, min_chars)
    if content.lstrip().startswith("["):
        return _parse(content, data_name(data), list)
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    return [_Line(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]


def _loaded(builder: str, called: str, /, **options: Any) -> Iterable[Any]:
    """What the library datasets makes of a table or finds on the hub."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f'{called} is read by the library datasets: pip install "corda_kernels[data]"'
        ) from error
    try:
        found: Iterable[Any] = datasets.load_dataset(builder, **options)
    except Exception as error:  # of many libraries beneath it
        reason = first_line(error.__cause__ or error)
        remedy = "check that the file is whole and of the kind that its name says"
        if "data_files" not in options:
            remedy = (
                "check the path; a data set of the hub is written name:split or "
                "name:configuration:split, and takes a network"
            )
        raise DataError(f"{called} cannot be loaded: {reason}; {remedy}") from error
    return found


def _read(path: Path, name: str) -> str:
    try:
        content = sys.stdin.buffer.read() if os.fspath(path) == _STDIN else path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{name}: no such data file; check the path (a data set of the hub is written "
            "name:split)"
        ) from error
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}; give one file of text, JSON, CSV or parquet"
        ) from error
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{name} is compressed and damaged ({error}): make or copy it again"
            ) from error
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text (at byte {error.start}): it is binary or in another "
            "encoding; convert it"
        ) from error
    if "\0" in text:
        raise DataError(f"{name} is binary, not text (it holds NUL); convert it")
    if not text.strip():
        raise DataError(f"{name} is empty: give a file with text")
    return text


def _spans(content: str, min_chars: int) -> list[str]:
    min_chars = min(min_chars, len(content))
    end = f"{{{min_chars},{4 * min_chars}}}?"
    pattern = rf".{end}\n[ \t]*\n|.{end}\n|.{{1,{4 * min_chars}}}"
    return [match[0].strip("\n") for match in re.finditer(pattern, content, re.DOTALL)]


def record_of(item: object, index: int, name: str) -> tuple[str, str | Mapping[str, Any]]:
    """A text or record, with where it stands."""
    if isinstance(item, _Line):
        where = f"{name}:{item.number}"
        return where, _parse(item.text, where, dict)
    if isinstance(item, str):
        return name, item
    where = f"record {index} (counted from 0) of {name}"
    if isinstance(item, Mapping):
        return where, item
    raise DataError(f"{where} is {shown(item)}: a text or a record, names with values, is needed")


def _parse(content: str, where: str, kind: type[T]) -> T:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        # The decoder's own line number would contradict the file's.
        wrong = f"is not valid JSON: {str(error).partition(': line ')[0]}"
    else:
        if isinstance(parsed, kind):
            return parsed
        wrong = f"is a JSON {type(parsed).__name__}, not an object"
    raise DataError(
        f"{where} {wrong}; one object a line is expected, or one array of objects in the whole "
        "file (jq -c . writes objects as lines)"
    )


def help_topics(path: str | os.PathLike[str]) -> Path:
    """Writes Python's help topics to a text file: prose and code that every Python carries.

    Raises:
        OutputError: it cannot be written.
    """
    from pydoc_data.topics import topics

    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return Path(path)
