"""Texts → token ids: problems to train on, questions to remember, prose, calibration text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corda_kernels.documents import read_texts
from corda_kernels.errors import DataError
from corda_kernels.outputs import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBLEM = "Question: {question}\nAnswer: {answer}"
QUESTION = "Q: {question}\nA: {answer[0]}"

# The marks of GSM8K's calculator are no language, and would be most of what there is to learn.
_CALCULATOR = re.compile(r"<<[^<>]*>>")
# So many batches are sorted by length together: less padding, in an order that is still random.
_WINDOW = 8


@dataclass(frozen=True)
class Item:
    """Token ids of a prompt, which is given, and of the answer, which counts."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, eq=False)
class Batch:
    """Items in rows, padded on the right.

    Attributes:
        ids: (rows, tokens) int64.
        real: (rows, tokens) bool, False where there is padding.
        answer: (rows, tokens) bool, True at the tokens of answers.
    """

    ids: Tensor
    real: Tensor
    answer: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.ids.to(device), self.real.to(device), self.answer.to(device))


def collate(items: Sequence[Item]) -> Batch:
    """Items as one batch, as long as the longest of them."""
    shape = len(items), max(map(len, items))
    ids = torch.zeros(shape, dtype=torch.int64)
    real, answer = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for row, item in enumerate(items):
        ids[row, : len(item)] = torch.tensor(item.prompt + item.answer)
        real[row, : len(item)] = True
        answer[row, len(item.prompt) : len(item)] = True
    return Batch(ids, real, answer)


def training_batches(items: Sequence[Item], *, steps: int, size: int, seed: int) -> list[Batch]:
    """Batches of items in a random order that depends on the seed alone; none comes twice.

    Raises:
        DataError: there are too few items.
    """
    if len(items) < steps * size:
        raise DataError(
            f"{steps} steps of {size} problems need {steps * size}, but only {len(items)} are "
            "short enough: allow longer ones, or take fewer steps"
        )
    source = random.Random(seed)
    order = source.sample(items, steps * size)
    batches: list[Batch] = []
    for start in range(0, len(order), _WINDOW * size):
        window = sorted(order[start : start + _WINDOW * size], key=len)
        groups = [window[first : first + size] for first in range(0, len(window), size)]
        batches += map(collate, source.sample(groups, len(groups)))
    return batches


def gradient_batches(items: Sequence[Item], size: int) -> list[dict[str, Tensor]]:
    """Items in order as `calibrate` takes them: the losses are those of their answers."""
    found = (collate(items[first : first + size]) for first in range(0, len(items), size))
    return [
        {
            "input_ids": batch.ids,
            "attention_mask": batch.real.long(),
            "labels": torch.where(batch.answer, batch.ids, -100),
        }
        for batch in found
    ]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file.

    Raises:
        DataError: there is no such file, or a line is not JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON lines ({error}): check the path") from error


def without_calculator(record: dict[str, Any]) -> dict[str, Any]:
    """A problem of GSM8K whose answer is plain text."""
    return record | {"answer": _CALCULATOR.sub("", record["answer"])}


def problems(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, end: bool
) -> list[Item]:
    """The problems of a file of GSM8K that take at most `max_tokens`, in the file's order.

    Args:
        path: JSON lines with `question` and `answer`.
        tokenizer: the model's.
        max_tokens: longer ones are left out, for a truncated answer is none.
        end: whether the answer is closed by the end token, as is learned but not measured.
    """
    closing = [tokenizer.eos_token_id] if end else []
    items = []
    for record in map(without_calculator, read_records(path)):
        prompt = tokenizer(f"Question: {record['question']}\nAnswer:").input_ids
        item = Item(prompt, spaced(tokenizer, record["answer"]) + closing)
        if len(item) <= max_tokens:
            items.append(item)
    return items


def spaced(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """An answer's tokens. The space before it is theirs: it is part of a word's first token."""
    ids: list[int] = tokenizer(f" {text}", add_special_tokens=False).input_ids
    return ids


def prose(path: Path, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int) -> Tensor:
    """The first tokens of documents taken at random from a text file, (samples, length) int64.

    Raises:
        DataError: there are too few documents of that length.
    """
    found = []
    for text in read_texts(path, min_chars=8 * length, seed=0):
        ids = tokenizer(text).input_ids
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == samples:
            return torch.tensor(found)
    raise DataError(
        f"{path} has {len(found)} of {samples} pieces of {length} tokens: give more text"
    )


def plain_problems(source: Path, target: Path) -> Path:
    """Writes the problems of GSM8K without the calculator's marks, to calibrate on."""
    with atomic_path(target) as temporary:
        lines = (json.dumps(without_calculator(record)) for record in read_records(source))
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target
