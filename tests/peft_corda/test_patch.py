from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import corda
from peft.tuners.lora.config import CordaConfig
from torch import nn

from corda_kernels.errors import CompatibilityError, CompatibilityWarning
from corda_kernels.peft_corda import TRIED_VERSIONS, patch_peft, preprocess_corda

ORIGINAL = corda.preprocess_corda


@pytest.fixture
def user_module() -> Iterator[ModuleType]:
    """A module that has imported PEFT's function, under another name."""
    module = ModuleType("users_script")
    module.prepare = ORIGINAL
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def is_ours(function: Any) -> bool:
    return getattr(function, "__wrapped__", None) is preprocess_corda


def test_the_import_gives_our_function_inside_the_block_and_pefts_after_it() -> None:
    with patch_peft():
        from peft.tuners.lora.corda import preprocess_corda as patched

        assert is_ours(patched)
    assert corda.preprocess_corda is ORIGINAL


def test_as_a_function_it_holds_until_it_is_taken_back() -> None:
    patch = patch_peft()
    try:
        assert is_ours(importlib.import_module("peft.tuners.lora.corda").preprocess_corda)
    finally:
        patch.restore()
    assert corda.preprocess_corda is ORIGINAL
    patch.restore()
    assert corda.preprocess_corda is ORIGINAL


def test_modules_that_had_imported_it_are_given_ours_and_named(user_module: ModuleType) -> None:
    with patch_peft() as patch:
        assert is_ours(user_module.prepare)
        # This test's own module holds it too, as ORIGINAL.
        assert {"users_script", __name__} <= set(patch.modules)
    assert user_module.prepare is corda.preprocess_corda is ORIGINAL


def test_pefts_call_runs_with_the_options_of_the_patch() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(3, 20, 6) * 10
    config = LoraConfig(
        r=2,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(prune_temporary_fields=False),
    )
    with patch_peft(normalize="tokens"):
        corda.preprocess_corda(model, config, run_model=lambda: model(x))
    rows = x.flatten(0, 1)
    torch.testing.assert_close(model[0].covariance_matrix, rows.T @ rows / len(rows))


def test_the_patched_function_takes_what_pefts_takes() -> None:
    with patch_peft():
        patched = list(inspect.signature(corda.preprocess_corda).parameters.values())
    theirs = list(inspect.signature(ORIGINAL).parameters.values())
    assert [(p.name, p.default, p.kind) for p in patched[:4]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert [p.kind for p in patched[4:]] == [inspect.Parameter.VAR_KEYWORD]


def test_unknown_options_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="normalise"):
        patch_peft(normalise="peft")
    assert corda.preprocess_corda is ORIGINAL


def test_the_installed_version_was_tried() -> None:
    assert importlib.metadata.version("peft") in TRIED_VERSIONS


def test_other_versions_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corda_kernels.peft_corda.patch._installed", lambda: "0.99.0")
    with pytest.warns(CompatibilityWarning, match=r"peft 0\.99\.0 is installed"), patch_peft():
        assert is_ours(corda.preprocess_corda)


def test_a_version_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corda, "preprocess_corda", lambda model, config, data: None)
    with pytest.raises(CompatibilityError, match=r"takes \(model, config, data\), not \(model"):
        patch_peft()


def test_a_version_without_corda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.corda", None)
    with pytest.raises(CompatibilityError, match=r"has no module peft\.tuners\.lora\.corda"):
        patch_peft()
