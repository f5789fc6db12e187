"""The code on the recipes page runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from corda_kernels import load_for_training
from corda_kernels.peft_corda import PeftPatch

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning")
def test_the_recipes_run(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import corda
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    tiny_model("llama", initializer_range=0.1).save_pretrained("my-model")
    batches = [{"input_ids": torch.randint(3, 64, (4, 16))} for _ in range(4)]
    monkeypatch.setattr("corda_kernels.load_tokenizer", lambda _: None)
    monkeypatch.setattr("corda_kernels.token_batches", lambda *_, **__: batches)
    patches: list[PeftPatch] = []
    started = PeftPatch.__init__

    def noted(self: PeftPatch, *arguments: Any) -> None:
        patches.append(self)
        started(self, *arguments)

    monkeypatch.setattr(PeftPatch, "__init__", noted)
    original = corda.preprocess_corda
    scope: dict[str, Any] = {}
    try:
        for block in re.findall(
            r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
        ):
            exec(compile(block, str(PAGE), "exec"), scope)
    finally:
        for patch in patches:
            patch.restore()
    assert corda.preprocess_corda is original
    assert scope["compressed"].shape == scope["scores"].shape == scope["weight"].shape
    base = AutoModelForCausalLM.from_pretrained("my-model")
    load_for_training(base, "my-adapter")
