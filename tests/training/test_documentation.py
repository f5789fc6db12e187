"""The code on the training page runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from corda_kernels import DriftPenalty

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning")
def test_the_page_runs(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", initializer_range=0.1).save_pretrained("my-model")
    batches = [{"input_ids": torch.randint(3, 64, (1, 24))} for _ in range(4)]
    monkeypatch.setattr("corda_kernels.load_tokenizer", lambda _: None)
    monkeypatch.setattr("corda_kernels.token_batches", lambda *_, **__: batches)
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), scope)
    assert DriftPenalty(scope["model"], scope["covariances"])() > 0
    assert 4 < scope["ranks"].average_rank < 16
    assert scope["output"].shape[0] == 2
