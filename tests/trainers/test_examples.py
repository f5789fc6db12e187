"""The scripts under examples/ run as they stand, and stock PEFT loads what they write."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from corda_kernels import load_for_training

EXAMPLES = Path(__file__).parents[2] / "examples"
# TRL and Trainer warn of what they do themselves; the texts are short.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def base(tiny_model: Callable[..., nn.Module], save_tokenizer: Any, tmp_path: Path) -> Path:
    model = tiny_model("llama", initializer_range=0.1, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def sentence(first: int, length: int) -> str:
    return " ".join(f"w{(first * 7 + index * index) % 60}" for index in range(length))


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_runs_and_stock_peft_loads_its_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from peft import PeftModel
    from peft.tuners.lora import corda
    from transformers import AutoModelForCausalLM

    text = written(tmp_path / "text.jsonl", [{"text": sentence(i, 150)} for i in range(20)])
    preferences = written(
        tmp_path / "preferences.jsonl",
        [
            {"prompt": sentence(i, 4), "chosen": sentence(i + 1, 4), "rejected": sentence(i + 2, 4)}
            for i in range(16)
        ],
    )
    problems = written(
        tmp_path / "problems.jsonl",
        [{"question": sentence(i, 70), "answer": sentence(i + 1, 70)} for i in range(16)],
    )
    data = {
        "plain_loop": [text, text],
        "trl_dpo": [text, preferences],
        "trl_grpo": [problems],
    }.get(name, [text])
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", [name, str(base), *data, str(out)])
    monkeypatch.setattr(corda, "preprocess_corda", corda.preprocess_corda)  # put back afterwards
    scope = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    # That of PEFT's own CorDA belongs on the residual, which stock PEFT does not make.
    load = load_for_training if name == "peft_script" else PeftModel.from_pretrained
    model = load(AutoModelForCausalLM.from_pretrained(base), out).eval()
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        logits = scope["model"].eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-4)
        with model.disable_adapter():
            trained = not torch.equal(model(input_ids=ids).logits, logits)
    assert trained
