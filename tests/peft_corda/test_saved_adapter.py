"""Adapters that PEFT made of this package's components, saved so that they load on the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corda_runs import lora, running, text
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from corda_kernels import export_lora, load_for_training
from corda_kernels.errors import AdapterError
from corda_kernels.peft_corda import preprocess_corda, save_adapter


@pytest.mark.filterwarnings("ignore:.*rank_pattern:UserWarning")
@pytest.mark.parametrize("pattern", [{}, {"q_proj": 7}], ids=["uniform", "rank_pattern"])
def test_a_saved_adapter_loads_on_the_base(
    calibrated: Callable[..., Any],
    logits: Callable[[nn.Module], Tensor],
    train: Callable[..., nn.Module],
    pattern: dict[str, int],
    tmp_path: Path,
) -> None:
    def base() -> nn.Module:
        return calibrated()[0]

    config = lora(cache_file=tmp_path / "c.pt")
    config.rank_pattern = pattern
    config.lora_alpha = 16
    model = base()
    preprocess_corda(model, config, running(model, text(6, 16)))
    adapted = train(get_peft_model(model, config))
    trained = logits(adapted)
    assert (trained - logits(base())).abs().max() > 0.1

    config.corda_config.cache_file = str(tmp_path / "c.pt")  # PEFT cannot save a Path
    adapted.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="`eigens` attribute not found"):
        PeftModel.from_pretrained(base(), tmp_path / "peft")

    save_adapter(adapted, tmp_path / "ours")
    loaded = load_for_training(base(), tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)
    export_lora(tmp_path / "ours", tmp_path / "plain")
    stock = PeftModel.from_pretrained(base(), tmp_path / "plain")
    torch.testing.assert_close(logits(stock), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [3, 4]},
        {"bias": "lora_only"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_adapter_that_trains_more_than_its_factors_is_not_saved_without_the_rest(
    calibrated: Callable[..., Any], option: dict[str, Any], tmp_path: Path
) -> None:
    config = lora(cache_file=tmp_path / "c.pt")
    ((name, value),) = option.items()
    setattr(config, name, value)
    model = calibrated()[0]
    preprocess_corda(model, config, running(model, text(6, 16)))
    adapted = get_peft_model(model, config)
    with pytest.raises(AdapterError, match=rf"trains more than A and B \({name}="):
        save_adapter(adapted, tmp_path / "ours")
