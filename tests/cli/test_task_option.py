"""`--task`: what a model is loaded for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_text import SMALL
from transformers import BartConfig, BartForConditionalGeneration, LlamaForSequenceClassification

from corda_kernels.models import load_model, load_skeleton

Command = Callable[..., tuple[int, str, list[str]]]


def test_a_classifier_is_made_of_a_language_model_and_keeps_its_head(
    command: Command, place: Path, tmp_path: Path
) -> None:
    model, out, task = place / "model", tmp_path / "out", ("--task", "sequence-classification")
    options = ("--mode", "ipm", "--data", place / "text.txt", *SMALL, *task)
    status, shown, said = command("init", model, out, *options)
    assert status == 0, said
    assert "IPM adapter of rank 4 for 14 layers" in shown
    assert any(
        "the head of LlamaForSequenceClassification (score.weight) is not in" in s for s in said
    )
    head = load_file(out / "adapter_model.safetensors")["base_model.model.score.weight"]
    base = LlamaForSequenceClassification.from_pretrained(model)  # with another head
    assert not torch.equal(base.score.weight, head)
    adapted = PeftModel.from_pretrained(base, out)
    assert type(adapted).__name__ == "PeftModelForSequenceClassification"
    assert torch.equal(base.score.modules_to_save["default"].weight, head)
    status, shown, said = command("merge", out, tmp_path / "merged", *task)
    assert status == 0, said
    assert "load it with LlamaForSequenceClassification.from_pretrained" in shown
    merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.score.weight, head)


def test_the_class_follows_the_config(
    command: Command, place: Path, tmp_path: Path, save_tokenizer: Callable[[Path], None]
) -> None:
    sizes = {f"{part}_ffn_dim": 40 for part in ("encoder", "decoder")}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "vocab_size": 64}
    folder = tmp_path / "bart"
    BartForConditionalGeneration(BartConfig(**sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    assert isinstance(load_model(folder), BartForConditionalGeneration)
    assert isinstance(load_skeleton(folder), BartForConditionalGeneration)
    assert type(load_skeleton(folder, task="feature-extraction")).__name__ == "BartModel"
    status, shown, said = command("plan", folder, "--samples", 4, "--seq-len", 8)
    assert status == 0, said
    assert "block by block: not possible, since the model is an encoder–decoder" in shown
    options = ("--data", place / "text.txt", *SMALL)
    status, shown, said = command("init", folder, tmp_path / "out", "--mode", "kpm", *options)
    assert status == 0, said
    assert "KPM adapter of rank 4 for 16 layers" in shown


def test_an_unknown_task_is_refused(command: Command, place: Path) -> None:
    status, _, said = command("plan", place / "model", "--task", "poetry")
    assert status == 2
    assert "task 'poetry' is not one of causal-lm, seq2seq-lm, " in said[0]
