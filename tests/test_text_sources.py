"""Where calibration text may come from: files of all kinds, standard input, the hub, memory."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import all_tokens, byte_tokenizer

from corda_kernels.documents import read_texts
from corda_kernels.errors import DataError, MissingExtraError
from corda_kernels.text import token_batches

RECORDS = [{"question": f"who, {n}?\n", "answer": f'"é{n}"'} for n in range(9)]
TEXTS = [f"{each['question']}{each['answer']}" for each in RECORDS]
TEMPLATE = "{question}{answer}"


def as_lines() -> bytes:
    return "".join(json.dumps(each) + "\n" for each in RECORDS).encode()


def as_array() -> bytes:
    return json.dumps(RECORDS, indent=1).encode()


def as_table(suffix: str, folder: Path) -> bytes:
    """What the library datasets, or Python for tabs, writes."""
    datasets = pytest.importorskip("datasets")
    path = folder / f"made.{suffix}"
    table = datasets.Dataset.from_list(RECORDS)
    if suffix == "arrow":
        table.save_to_disk(folder / "saved")
        return next((folder / "saved").glob("*.arrow")).read_bytes()
    if suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if suffix == "tsv" else ",")
    return path.read_bytes()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library datasets, with its cache in the test's folder and without its bars."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.JSON", "a.jsonl.gz", "a.json.gz"])
def test_json_is_read_as_lines_or_as_an_array(tmp_path: Path, name: str) -> None:
    for content in (as_lines(), as_array()):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert list(read_texts(path, template=TEMPLATE)) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.csv.gz", "a.tsv", "a.parquet", "a.arrow"])
def test_tables_are_read_by_datasets(tmp_path: Path, cached: Any, name: str) -> None:
    path = tmp_path / name
    content = as_table(name.lower().split(".")[1], tmp_path)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_texts(path, template=TEMPLATE)) == TEXTS


def test_a_tables_name_is_no_pattern(tmp_path: Path, cached: Any) -> None:
    (tmp_path / "a[1].csv").write_text("text\none\n")
    (tmp_path / "a1.csv").write_text("text\nother\n")
    assert list(read_texts(tmp_path / "a[1].csv")) == ["one"]


def test_compressed_text_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(gzip.compress("é\r\nb".encode()))
    assert list(read_texts(tmp_path / "a.txt")) == ["é\nb"]


def test_an_array_may_hold_texts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", " ", "two"]')
    assert list(read_texts(tmp_path / "a.json")) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (as_lines(), {"template": TEMPLATE}, TEXTS),
        (as_array(), {"template": TEMPLATE}, TEXTS),
        (gzip.compress(as_lines(), mtime=0), {"template": TEMPLATE}, TEXTS),
        (b'["one", "two"]', {}, ["one", "two"]),
        (b"[1] a footnote\n", {}, ["[1] a footnote"]),
        (b"{a set}\n", {}, ["{a set}"]),
    ],
)
def test_standard_input_is_json_where_it_begins_like_it(
    monkeypatch: pytest.MonkeyPatch, content: bytes, options: Any, expected: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert list(read_texts("-", **options)) == expected


def test_standard_input_is_named_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(as_lines())))
    with pytest.raises(DataError, match="standard input:1 has no field 'text': present: question"):
        list(read_texts("-"))


def memory(kind: str) -> Any:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(RECORDS)
    return {
        "records": RECORDS,
        "tuple": tuple(RECORDS),
        "generator": (each for each in RECORDS),
        "Dataset": made,
        "IterableDataset": made.to_iterable_dataset(),
    }[kind]


@pytest.mark.parametrize("kind", ["records", "tuple", "generator", "Dataset", "IterableDataset"])
def test_data_in_memory(tmp_path: Path, kind: str) -> None:
    assert list(read_texts(memory(kind), template=TEMPLATE)) == TEXTS
    shuffled = list(read_texts(memory(kind), template=TEMPLATE, seed=3))
    if kind in ("generator", "IterableDataset"):  # of no length: in their own order
        assert shuffled == TEXTS
    else:
        path = tmp_path / "a.jsonl"
        path.write_bytes(as_lines())
        assert shuffled == list(read_texts(path, template=TEMPLATE, seed=3)) != TEXTS


def test_an_endless_iterable_is_read_as_far_as_needed() -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append("text")
            yield "0123456789"

    (batch,) = token_batches(endless(), byte_tokenizer(), samples=1, seq_len=22)
    assert batch["input_ids"].shape == (1, 22)
    assert len(read) == 2


def test_texts_in_memory_are_documents() -> None:
    assert all_tokens(["one"], byte_tokenizer()) == "one<eos>"
    with pytest.raises(DataError, match="the data is plain text and has no fields"):
        list(read_texts(["one"], field="a"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ["a"]}, r'must be a path, .*data\["train"\]'),
        (5, "data must be a path"),
        (["one", 5], r"record 1 \(counted from 0\) of the data is 5: a text or a record"),
        ([["one"]], "record 0 .* a text or a record"),
        (b"one", "record 0 .* is 111"),
    ],
)
def test_other_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_texts(data))


def test_several_splits_are_refused() -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    with pytest.raises(DataError, match=r'of several splits give one, such as data\["train"\]'):
        list(read_texts(splits))


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("owner/name:train", ("owner/name", None, "train")),
        ("name:main:test", ("name", "main", "test")),
        ("owner/name:train[:10%]", ("owner/name", None, "train[:10%]")),
    ],
)
def test_a_data_set_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, cached: Any, written: str, asked: tuple[Any, ...]
) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str) -> Any:
        calls.append((path, name, split))
        return cached.Dataset.from_list(RECORDS)

    monkeypatch.setattr(cached, "load_dataset", load_dataset)
    assert list(read_texts(written, template=TEMPLATE)) == TEXTS
    assert calls == [asked]


def test_a_file_goes_before_a_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("name:train").write_text("one")
    assert list(read_texts("name:train")) == ["one"]


def test_a_data_set_out_of_reach(cached: Any) -> None:
    with pytest.raises(DataError, match=r"owner/name:train cannot be loaded: .*name:split"):
        read_texts("owner/name:train")


@pytest.mark.parametrize(("name", "content"), [("a.parquet", b"PAR1"), ("a.csv", b"\xff\xfe\xfd")])
def test_a_damaged_table(tmp_path: Path, cached: Any, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be loaded: .*; check that the file"):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("content", ["[1, 2", '[{"a": 1}]\n[2]'])
def test_a_damaged_array(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json is not valid JSON: .*one array of objects"):
        read_texts(tmp_path / "a.json")


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    writers: dict[str, Callable[[], bytes]] = {"a.jsonl": as_lines, "a.json": as_array}
    for name, written in writers.items():
        (tmp_path / name).write_bytes(written())
        assert list(read_texts(tmp_path / name, template=TEMPLATE)) == TEXTS
    (tmp_path / "a.txt").write_text("one")
    assert list(read_texts(tmp_path / "a.txt")) == ["one"]
    (tmp_path / "a.csv").write_text("text\none\n")
    for data in (tmp_path / "a.csv", "owner/name:train"):
        with pytest.raises(MissingExtraError, match=r'pip install "corda_kernels\[data\]"'):
            read_texts(data)
