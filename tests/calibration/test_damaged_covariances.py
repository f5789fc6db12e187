"""Covariance files and checkpoints, damaged one field at a time under a checksum that fits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_bytes, damaged_json, damaged_tensors, header_size, seal
from torch import nn

from corda_kernels import CovarianceSet, calibrate, calibrate_blocks
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration.journal import FORMAT as CHECKPOINT
from corda_kernels.errors import (
    CheckpointError,
    CordaError,
    CovarianceError,
    CovarianceFileError,
)
from corda_kernels.fields import parse_json
from corda_kernels.files import read_checked
from corda_kernels.planning import LayerStability, Selection, Stability, select_covariance

pytestmark = pytest.mark.slow

BATCHES = [torch.arange(3, 23).view(2, 10), torch.arange(23, 43).view(2, 10)]
COVARIANCES = "corda_kernels.covariances/1"
# Numbers that no other number in a file tells the right value of.
NUMBERS = ("tokens", "calls", "outlier_threshold")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return tiny_model("llama", initializer_range=0.1)


@pytest.fixture(scope="module")
def files(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undamaged files; nothing here is written to."""
    root = tmp_path_factory.mktemp("files")
    options: Any = {"targets": ["q_proj", "k_proj"], "progress": False}
    candidates = [calibrate(model, [batch], **options) for batch in BATCHES]
    chosen = select_covariance(model, candidates, progress=False)
    stability = Stability(4, 0.01, (9, 9), {name: LayerStability(0.9, None) for name in chosen})
    chosen.provenance.update(stability=asdict(stability), data={"file": "x"}, domain="x")
    chosen.left_out["experts"] = "no linear layer"
    chosen.save(root / "covariances")
    checkpoint = CalibrationCheckpoint(root / "run", every=1)
    calibrate(model, BATCHES, checkpoint=checkpoint, **options)
    blocks = CalibrationCheckpoint(root / "blocks", every=1)
    next(calibrate_blocks(model, BATCHES, checkpoint=blocks, **options))
    return root


def parts(file: Path, format_: str) -> tuple[Any, dict[str, Any]]:
    return read_checked(file, format_, what="", error=CovarianceFileError, remedy="")


def load(path: Path, model: nn.Module) -> CovarianceSet:
    """A covariance file, or what a calibration that goes on from a checkpoint yields."""
    if path.name == "covariances":
        return CovarianceSet.load(path)
    run = path.with_name(path.name.removesuffix("-block-0"))
    options: Any = {
        "targets": ["q_proj", "k_proj"],
        "checkpoint": CalibrationCheckpoint(run, every=10**9, resume=True),
        "progress": False,
    }
    if run == path:
        return calibrate(model, BATCHES, **options)
    pieces = list(calibrate_blocks(model, BATCHES, **options))
    return CovarianceSet({name: piece[name] for piece in pieces for name in piece})


def same(found: CovarianceSet, expected: CovarianceSet) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].matrix, expected[name].matrix) for name in expected
    )


def use(covariances: CovarianceSet) -> None:
    """What could be loaded can be used."""
    covariances.merge(covariances)
    with contextlib.suppress(CovarianceError):
        Selection.from_json(covariances.provenance.get("selection")).summary()  # type: ignore[arg-type]
    with contextlib.suppress(CovarianceError):
        Stability.from_json(covariances.provenance.get("stability")).summary()  # type: ignore[arg-type]


def test_a_field_of_a_covariance_file(files: Path, tmp_path: Path) -> None:
    header, tensors = parts(files / "covariances", COVARIANCES)
    expected = CovarianceSet.load(files / "covariances")
    for path, text in damaged_json(header):
        seal(tmp_path / "c", COVARIANCES, text, tensors)
        try:
            found = CovarianceSet.load(tmp_path / "c")
        except CovarianceFileError:
            continue
        assert path.startswith(("provenance", "left_out")) or path.endswith(NUMBERS), (path, text)
        assert same(found, expected), (path, text)
        use(found)


@pytest.mark.parametrize("name", ["covariances", "run", "blocks-block-0"])
def test_a_tensor(files: Path, tmp_path: Path, model: nn.Module, name: str) -> None:
    format_ = COVARIANCES if name == "covariances" else CHECKPOINT
    header, tensors = parts(files / name, format_)
    for damage, broken in damaged_tensors(tensors):
        seal(tmp_path / name, format_, json.dumps(header), broken)
        matrix = damage.endswith("matrix torch.float64")
        try:
            load(tmp_path / name, model)
        except (CovarianceFileError, CheckpointError):
            assert not matrix, damage
            continue
        assert matrix, damage


@pytest.mark.parametrize("name", ["covariances", "run", "blocks-block-0"])
def test_a_byte(files: Path, tmp_path: Path, model: nn.Module, name: str) -> None:
    contents = (files / name).read_bytes()
    for damage, broken in damaged_bytes(contents, header_size(contents)):
        (tmp_path / name).write_bytes(broken)
        try:
            load(tmp_path / name, model)
        except (CovarianceFileError, CheckpointError):
            continue
        pytest.fail(damage)


@pytest.mark.parametrize("name", ["run", "blocks-block-0"])
def test_a_field_of_a_checkpoint(files: Path, tmp_path: Path, model: nn.Module, name: str) -> None:
    header, tensors = parts(files / name, CHECKPOINT)
    expected = load(files / name, model)
    for path, text in damaged_json(header):
        seal(tmp_path / name, CHECKPOINT, text, tensors)
        try:
            found = load(tmp_path / name, model)
        except CordaError:
            continue
        assert path.startswith("groups"), (path, text)
        assert path.endswith(NUMBERS), (path, text)
        if path.endswith("outlier_threshold"):
            assert same(found, expected)


def test_a_field_of_a_selection(files: Path) -> None:
    header, _ = parts(files / "covariances", COVARIANCES)
    expected = Selection.from_json(header["provenance"]["selection"])
    for path, text in damaged_json(header["provenance"]["selection"]):
        try:
            found = Selection.from_json(parse_json(text))
        except (ValueError, CordaError):
            continue
        assert path.startswith(("scores", "tokens", "domains", "damping")), (path, text)
        assert found.groups == expected.groups
