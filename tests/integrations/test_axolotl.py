"""The plugin of axolotl, among stand-ins for the parts of axolotl 0.19.0 that it meets."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from corda_kernels import CordaConfig, CovarianceSet, init_corda
from corda_kernels.errors import ConfigError

ROWS = [{"input_ids": list(range(3 + i, 23 + i)), "labels": [-100] * 20} for i in range(6)]
OPTIONS = {"mode": "ipm", "rank": 4, "progress": False}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    rows = SimpleNamespace(train_dataset=ROWS)  # only iterated: see `_rows`
    data = SimpleNamespace(load_datasets=lambda cfg: rows)
    monkeypatch.setitem(sys.modules, "axolotl.common.datasets", data)  # type: ignore[arg-type]
    with monkeypatch.context() as only_here:
        for name, attribute in (
            ("axolotl.integrations.base", "BasePlugin"),
            ("pydantic", "BaseModel"),
        ):
            stub = SimpleNamespace(**{attribute: object})
            only_here.setitem(sys.modules, name, stub)  # type: ignore[arg-type]
        module = importlib.import_module("corda_kernels.integrations.axolotl")
    return module.CordaPlugin()


def configured(out: Path, **changes: Any) -> Any:
    """What axolotl gives its plugins; a key that is not set is None there."""
    keys = {"corda": OPTIONS, "lora_model_dir": None, "rl": None}
    return SimpleNamespace(**{**keys, "adapter": "lora", "output_dir": str(out), **changes})


@pytest.mark.parametrize("samples", [4, 9])
def test_axolotl_loads_the_start_that_the_plugin_makes_of_the_first_rows(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
    logits: Callable[[nn.Module], Tensor],
    tmp_path: Path,
    plugin: Any,
    samples: int,
) -> None:
    base, _ = calibrated()
    corda = {**OPTIONS, "samples": samples}
    cfg = configured(tmp_path, base_model=base.name_or_path, corda=corda)
    # As do_train, then ModelLoader.load, then load_lora.
    plugin.load_datasets(cfg, preprocess=False)
    model = copy.deepcopy(base)
    loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=True)

    assert torch.equal(logits(loaded), logits(base))
    batches = [torch.tensor([row["input_ids"]]) for row in ROWS[:samples]]
    expected = init_corda(copy.deepcopy(base), batches, CordaConfig(**OPTIONS))
    pairs = zip(expected.named_parameters(), loaded.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad, name


def test_what_axolotl_would_not_train_is_refused_before_the_work(
    tmp_path: Path, plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({"corda": None}, {"lora_model_dir": "trained"}):
        cfg = configured(tmp_path, **changes)
        plugin.load_datasets(cfg)
        assert cfg.lora_model_dir == changes.get("lora_model_dir")
    plugin.load_datasets(configured(tmp_path), preprocess=True)
    for changes in ({"rl": "dpo"}, {"adapter": None}):
        with pytest.raises(ConfigError, match=r"trainers\.md"):
            plugin.load_datasets(configured(tmp_path, **changes))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="lora_model_dir"):
        plugin.load_datasets(configured(tmp_path))
