"""Every row of the table of model types, in docs/models.md, is what happens."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ADAPTER, BLOCKS, FAMILIES, PAGE, PLAN, REFUSALS, Family, page
from family_batches import Batch
from peft import PeftModel
from torch import Tensor, nn

from corda_kernels import (
    CordaConfig,
    calibrate,
    calibrate_blocks,
    export_lora,
    init_corda,
    merge,
    save_adapter,
)
from corda_kernels.calibration.needs import calibration_needs
from corda_kernels.errors import CordaError
from corda_kernels.experts import expert_parameters
from corda_kernels.linears import is_linear
from corda_kernels.models import load_model, load_skeleton

QUICK = ("llama", "mixtral", "distilbert", "bart", "vit", "llava")
# What is left out, how little text this is, and PEFT's notes on ranks of experts' parameters and on
# embeddings that were never tied.
pytestmark = [
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]


def made(family: Family, folder: Path) -> Any:
    """A tiny model whose every weight counts, loaded from its folder."""
    config = transformers.AutoConfig.for_model(family.kind, **family.sizes)
    kind: Any = getattr(transformers, family.model)
    model = kind.from_config(config) if family.model.startswith("Auto") else kind(config)
    with torch.no_grad():
        for module in model.modules():
            if is_linear(module) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d):
                module.weight.normal_(0, 0.2)
        for parameter in expert_parameters(model).values():
            getattr(parameter.module, parameter.attribute).normal_(0, 0.2)
    model.float().save_pretrained(folder)
    return load_model(folder, dtype="float32")


def output(model: Any, batch: Batch) -> Tensor:
    """What the model is for."""
    given = model(**batch)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in given:
            found: Tensor = given[name]
            return found
    raise AssertionError(given.keys())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def refusal(family: Family, what: str) -> Any:
    """A context in which the family is refused for its reason, where it is."""
    mark = family.refused.get(what)
    if mark is None:
        return contextlib.nullcontext()
    return pytest.raises(CordaError, match=REFUSALS[mark])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, id=each.kind, marks=() if each.kind in QUICK else pytest.mark.slow)
        for each in FAMILIES
    ],
)
def test_a_model_of_every_type(family: Family, tmp_path: Path) -> None:
    base, batch = made(family, tmp_path / "base"), family.batch()
    options: dict[str, Any] = {"experts": "shared" if expert_parameters(base) else None}
    options |= {"progress": False}
    with refusal(family, ADAPTER):
        adapt(base, batch, CordaConfig("ipm", rank=2, **options), tmp_path)
    with refusal(family, PLAN):
        experts = options["experts"]
        needs = calibration_needs(load_skeleton(tmp_path / "base"), None, experts, seq_len=8)
    with refusal(family, BLOCKS):
        blocks = calibrate_blocks(base, [batch], **options)
        found = {name: each for block in blocks for name, each in block.items()}
    if ADAPTER in family.refused:
        return
    whole = calibrate(base, [batch], on_unseen="skip", **options)
    if BLOCKS not in family.refused:
        assert found.keys() == whole.keys()
        assert all(close(found[name].matrix, each.matrix) for name, each in whole.items())
    if PLAN not in family.refused:
        groups = {frozenset(names) for _, names in needs.groups}
        for _, names in whole.groups():  # what reads images alone is not seen to share an input
            assert frozenset(names) in groups or "pixel_values" in batch, names
        assert whole.keys() <= set().union(*groups) <= whole.keys() | whole.left_out.keys()
        assert (needs.block_bytes is None) <= (BLOCKS in family.refused)


@torch.no_grad()
def _same(model: nn.Module, batch: Batch, expected: Tensor) -> None:
    assert close(output(model.eval(), batch), expected)


def adapt(base: nn.Module, batch: Batch, config: CordaConfig, folder: Path) -> None:
    """Start, step, save, load, export, merge."""
    with torch.no_grad():
        expected = output(base, batch)
    model: Any = init_corda(copy.deepcopy(base), [batch], config)
    _same(model, batch, expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    (output(model, batch) * torch.randn(expected.shape)).mean().backward()
    optimizer.step()
    changed = output(model, batch).detach()
    assert not close(changed, expected, 1e-4)
    save_adapter(model, folder / "adapter")
    export_lora(folder / "adapter", folder / "lora")
    for kept in ("adapter", "lora"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / kept)
        _same(loaded, batch, changed)
    _same(merge(model), batch, changed)


def test_the_page_shows_the_table() -> None:
    shown = PAGE.read_text(encoding="utf-8")
    assert page(shown) == shown, "run python tests/families.py"
    assert len(FAMILIES) == len({family.kind for family in FAMILIES}) >= 60
