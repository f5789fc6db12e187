"""PEFT's files and their notes, damaged one field at a time: a CacheError, or the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_bytes, damaged_json, damaged_tensors
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from torch import nn

from corda_kernels.errors import CacheError
from corda_kernels.peft_corda import preprocess_corda
from corda_kernels.peft_corda.cache import notes_path, read_cache, read_covariances
from corda_kernels.peft_corda.targets import corda_targets

pytestmark = pytest.mark.slow

RECIPE = {"corda_method": "ipm", "damping": 0.01, "normalize": "peft"}
# Notes by which nothing is computed.
DESCRIPTIVE = (
    *("base.source", "base.quantised", "base.task_type", "base.fan_in_fan_out"),
    *("base.target_modules", "calls"),
)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return tiny_model("llama", initializer_range=0.1)


@pytest.fixture(scope="module")
def files(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged cache and covariance file; nothing here is written to."""
    root = tmp_path_factory.mktemp("files")
    ids = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    config = lora(cache_file=str(root / "cache"), covariance_file=str(root / "covariances"))
    preprocess_corda(model, config, lambda: model(ids))
    return root


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        r=4,
        target_modules=["q_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm", **options),
    )


def read(path: Path, model: nn.Module) -> list[torch.Tensor]:
    """All tensors that the file gives the model's layers."""
    targets = corda_targets(model, lora())
    if path.name == "covariances":
        found = read_covariances(path, targets, "peft", model)
        return [entry.matrix for entry in found.values()]
    cached, _ = read_cache(path, targets, RECIPE, model)
    again, _ = read_cache(path, targets, {}, None)
    parts = [(entry.S_WC, entry.U_WC, entry.V_WC) for entry in (*cached.values(), *again.values())]
    return [tensor for part in parts for tensor in part]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def resealed(path: Path) -> None:
    """Puts the file's checksum into its notes."""
    notes = json.loads(notes_path(path).read_text())
    notes["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    notes_path(path).write_text(json.dumps(notes))


@pytest.fixture(params=["cache", "covariances"])
def path(request: pytest.FixtureRequest, files: Path, tmp_path: Path) -> Path:
    for name in (request.param, f"{request.param}.json"):
        shutil.copy(files / name, tmp_path / name)
    return tmp_path / str(request.param)


def test_a_field_of_the_notes(path: Path, model: nn.Module) -> None:
    expected = read(path, model)
    file = notes_path(path)
    for field, text in damaged_json(json.loads(file.read_text())):
        file.write_text(text)
        try:
            found = read(path, model)
        except CacheError:
            continue
        assert field.startswith(DESCRIPTIVE), (field, text)
        assert same(found, expected), (field, text)


# Without notes, as PEFT writes it, the file is taken with a warning.
@pytest.mark.filterwarnings("ignore:.*no notes beside it")
@pytest.mark.parametrize("noted", [True, False])
def test_a_tensor(path: Path, model: nn.Module, noted: bool) -> None:
    expected = read(path, model)
    whole = torch.load(path, weights_only=True)
    others = [
        ("sparse", {name: tensor.to_sparse() for name, tensor in whole.items()}),
        ("meta", {name: tensor.to("meta") for name, tensor in whole.items()}),
        ("numbers", dict.fromkeys(whole, 1.0)),
        ("a list", list(whole.values())),
        ("numbered", dict(enumerate(whole.values()))),
    ]
    if not noted:
        notes_path(path).unlink()
    for damage, tensors in [*damaged_tensors(whole), *others]:
        torch.save(tensors, path)
        if noted:
            resealed(path)
        try:
            found = read(path, model)
        except CacheError:
            continue
        # Rounded, absent, or beside the point; what is absent the caller reports.
        if damage.endswith("turned"):  # a symmetric matrix is the same
            assert same(found, expected), damage
            continue
        assert damage.endswith(("float16", "float64", "gone", "elsewhere", "extra", "none")), damage
        if damage.endswith(("float64", "extra")):
            assert same(found, expected), damage


@pytest.mark.filterwarnings("ignore:.*no notes beside it")
@pytest.mark.parametrize("noted", [True, False])
def test_a_byte(path: Path, model: nn.Module, noted: bool) -> None:
    contents = path.read_bytes()
    expected = read(path, model)
    if not noted:
        notes_path(path).unlink()
    for damage, broken in damaged_bytes(contents, len(contents)):
        path.write_bytes(broken)
        if noted and damage.startswith("cut"):
            resealed(path)
        try:
            found = read(path, model)
        except CacheError:
            continue
        assert not noted, damage
        assert len(found) <= len(expected)
