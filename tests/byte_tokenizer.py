"""A tokenizer of bytes, and files of text, for the tests of calibration text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from corda_kernels.errors import CordaWarning
from corda_kernels.text import token_batches

QUESTIONS = [{"question": f"what is {n}", "answer": [f"number {n}", str(n)]} for n in range(40)]


def byte_tokenizer(
    *, layout: str = "$A", eos: str | None = "<eos>", chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte, so that every text is told exactly by its tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>"]
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    backend.post_processor = processors.TemplateProcessing(
        single=layout, special_tokens=[(name, backend.token_to_id(name)) for name in special]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def write(folder: Path, content: str, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def write_records(folder: Path, *records: object) -> Path:
    return write(folder, "".join(json.dumps(record) + "\n" for record in records))


def all_tokens(path: Path | list[str], tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    """The text of every token there is, as one short sequence."""
    with pytest.warns(CordaWarning, match="used up"):
        (batch,) = token_batches(path, tokenizer, seq_len=10**6, **options)
    return tokenizer.decode(batch["input_ids"][0])
