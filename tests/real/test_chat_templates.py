"""Conversations under the chat template of SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_chat import CONVERSATIONS, records
from transformers import PreTrainedTokenizerBase

from corda_kernels import load_tokenizer, token_batches
from corda_kernels.documents import read_texts

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base_folder)


@pytest.mark.parametrize("kind", ["messages", "ShareGPT", "prompt and completion", "texts"])
def test_every_layout_is_rendered_as_the_tokenizer_renders_it(
    tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    found = list(read_texts(records(kind), chat_tokenizer=tokenizer))
    turns = 2 if kind == "texts" else 4
    assert found == [
        tokenizer.apply_chat_template(each[:turns], tokenize=False) for each in CONVERSATIONS
    ]


@pytest.mark.parametrize("pack", [True, False])
def test_answers_are_what_stands_between_the_models_own_marks(
    tokenizer: PreTrainedTokenizerBase, pack: bool
) -> None:
    batches = token_batches(
        records("messages"),
        tokenizer,
        samples=1 if pack else 5,
        seq_len=330 if pack else 512,
        batch_size=2,
        chat_template=True,
        answers_only=True,
        pack=pack,
    )
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = [start, *tokenizer("assistant")["input_ids"]]
    feed = tokenizer("\n")["input_ids"]
    checked = 0
    for batch in batches:
        for ids, counted in zip(batch["input_ids"].tolist(), batch["token_mask"], strict=True):
            expected = [False] * len(ids)
            for place in range(len(ids)):
                if ids[place - len(header) : place] == header:
                    # A line feed ends the header; where white space follows it is one token.
                    first = place + (ids[place : place + 1] == feed)
                    last = ids.index(end, first) + 1  # with the line feed behind it
                    expected[first : last + 1] = [True] * (last + 1 - first)
            assert counted.tolist() == expected
            checked += sum(expected)
    assert checked > 40
