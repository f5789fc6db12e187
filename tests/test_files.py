from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from corda_kernels import files
from corda_kernels.errors import CovarianceFileError, OutputError
from corda_kernels.files import digest, read_checked, write_checked, write_json, write_tensors


def test_a_full_disk_that_safetensors_reports_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_tensors(tmp_path / "result", {}, {})


CHECKED = {"what": "kind of", "error": CovarianceFileError, "remedy": "make it again"}


@pytest.mark.slow
def test_equal_contents_make_equal_files_in_every_process(tmp_path: Path) -> None:
    code = """
import sys, torch
from corda_kernels.files import write_checked
for path in sys.argv[1:]:
    write_checked(path, "f/1", {"a": "σ", "b": [1]}, {"x": torch.ones(3), "y": torch.zeros(2)})
"""
    paths = [str(tmp_path / str(number)) for number in range(4)]
    subprocess.run([sys.executable, "-c", code, *paths[:2]], check=True)
    contents = {"x": torch.ones(3), "y": torch.zeros(2)}
    for path in paths[2:]:
        write_checked(path, "f/1", {"a": "σ", "b": [1]}, contents)
    first, *others = (path.read_bytes() for path in tmp_path.iterdir())
    assert others == [first] * 3
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
