from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from kinds import Calibrated, Make

from corda_kernels import save_adapter
from corda_kernels.adapter import AdapterRecord
from corda_kernels.adapter.card import SERVED_RANKS, adapter_card, export_card
from corda_kernels.adapter.record import LayerNote


def record(source: str | None = "owner/base", **changes: Any) -> AdapterRecord:
    layers = {name: LayerNote(4, tokens, 2.0, 1.0, 0.0) for name, tokens in (("a", 1234), ("b", 9))}
    values: dict[str, Any] = {"mode": "kpm", "rank": 4, "hold": 1.0, "residual": None}
    values |= {"damping": 0.01, "base": {"source": source}, "calibration": {}, "layers": layers}
    return AdapterRecord(**(values | {"versions": {"corda_kernels": "1.2"}} | changes))


@pytest.mark.parametrize("source", ["owner/base", "a: b", 'C:\\models\\"base"', "日本/#1"])
@pytest.mark.parametrize(
    "make",
    [
        lambda source: adapter_card(record(source), 8),
        lambda source: adapter_card(record(source, hold=None, residual="weight"), 4),
        lambda source: export_card(source, 8, "Nothing was cut off."),
    ],
    ids=["plain", "published", "export"],
)
def test_the_hub_reads_the_front_matter(make: Callable[[str], str], source: str) -> None:
    card = ModelCard(make(source))
    assert card.data.base_model == source
    assert card.data.library_name == "peft"
    assert {"lora", "corda"} <= set(card.data.tags)
    assert f"Base model: `{source}`." in card.text


def test_a_nameless_base_is_not_made_up() -> None:
    for text in (adapter_card(record(None), 8), export_card(None, 8, "")):
        assert "base_model" not in text
        assert "Base model: a model without a name." in text
        assert "None" not in text


@pytest.mark.parametrize(("mode", "expected"), [("kpm", "smallest"), ("ipm", "largest")])
def test_the_card_says_how_the_adapter_was_made(mode: str, expected: str) -> None:
    text = adapter_card(record(mode=mode), 8)
    made = f"in mode {mode.upper()}, from the {expected} components of W·C, "
    assert f"Initialised by corda_kernels 1.2 {made}" in text
    assert "and C the covariance of its inputs.\n" in text
    assert "4 components of each layer at most, calibrated on 1,234 tokens." in text


def test_the_card_of_a_plain_lora_says_how_to_load_it() -> None:
    text = adapter_card(record(), 8)
    assert "a plain LoRA of rank 8, twice the number of components" in text
    assert "PeftModel.from_pretrained(base, FOLDER, is_trainable=True)  # to train" in text
    assert "load_for_training" not in text


def test_the_card_of_the_published_form_does_not_lead_to_stock_peft() -> None:
    text = adapter_card(record(hold=None, residual="weight"), 4)
    assert "load_for_training(base, FOLDER)" in text
    assert 'export_lora(FOLDER, "my-lora")' in text
    assert "PeftModel" not in text
    assert "vllm" not in text


def test_the_card_of_a_budget_leads_to_the_export() -> None:
    text = adapter_card(record(allocation={"ranks": {"a": 4, "b": 2}}), 8)
    assert 'corda_kernels.export_lora(FOLDER, "my-lora")' in text
    assert "vllm" not in text


@pytest.mark.parametrize(("rank", "least"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320)])
def test_servers_are_told_a_rank_that_they_take(rank: int, least: int) -> None:
    for text in (adapter_card(record(), rank), export_card("owner/base", rank, "")):
        assert f"--max-lora-rank {least}`" in text


def test_a_rank_that_no_server_takes_is_said_to_be_none() -> None:
    text = export_card("owner/base", SERVED_RANKS[-1] + 1, "")
    assert "vllm serve" not in text
    assert "vLLM serves rank 512 at most" in text


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_saved_adapter_has_its_card(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, use_peft: bool
) -> None:
    model = adapt(calibrated(), use_peft=use_peft)
    save_adapter(model, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == adapter_card(model.corda_record, 8)
    assert json.dumps(calibrated()[0].name_or_path) in text
