"""What a model can do: the task, knowledge, prose. Per item, so that changes can be paired."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda_kernels.structure import decoder, input_device

from .data import Item, collate, spaced
from .likelihood import answer_nll, mean_by_row, without_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DISTRACTORS = 9


@dataclass(frozen=True)
class Quiz:
    """Questions after a few answered ones.

    Attributes:
        shots: token ids that come before every question.
        choices: for each question the item with its answer, then those with wrong ones.
    """

    shots: list[int]
    choices: list[list[Item]]


@dataclass(frozen=True, eq=False)
class Examination:
    """What every model is measured on, always the same.

    Attributes:
        task: problems that were not trained on.
        knowledge: questions.
        text: (samples, length) prose.
        ranked: the number of questions whose answers are ranked.
        batch_size: items at a time.
    """

    task: list[Item]
    knowledge: Quiz
    text: Tensor
    ranked: int
    batch_size: int = 16

    def take(self, model: nn.Module) -> dict[str, Tensor]:
        """Negative log-likelihood a token, in nats: of each item's answer, of each piece of text.

        Args:
            model: a causal language model in evaluation mode.

        Returns:
            By measure ("task", "knowledge", "text") a value for each item, float64.
        """
        right = [choices[0] for choices in self.knowledge.choices]
        whole = [Item([int(ids[0])], ids[1:].tolist()) for ids in self.text]
        return {
            "task": item_nll(model, self.task, self.batch_size),
            "knowledge": item_nll(model, right, self.batch_size, self.knowledge.shots),
            "text": item_nll(model, whole, self.batch_size),
        }

    def rank(self, model: nn.Module) -> Tensor:
        """For the first questions how many answers are more probable a token than the right one.

        Returns:
            (ranked,) int64 from 0, the right answer is the most probable one, to 9.
        """
        asked = self.knowledge.choices[: self.ranked]
        flat = [item for choices in asked for item in choices]
        nll = item_nll(model, flat, self.batch_size, self.knowledge.shots)
        by_question = nll.view(len(asked), -1)
        return (by_question[:, 1:] < by_question[:, :1]).sum(dim=1)


@torch.no_grad()
def item_nll(
    model: nn.Module, items: Sequence[Item], batch_size: int, prefix: Sequence[int] = ()
) -> Tensor:
    """Mean negative log-likelihood of each item's answer tokens, (items,) float64.

    Args:
        model: a causal language model.
        items: in any order; those of like length go together.
        batch_size: items at a time.
        prefix: token ids that come before every item; they are run once.
    """
    past = _past(model, prefix) if prefix else None
    order = sorted(range(len(items)), key=lambda index: len(items[index]))
    found = torch.empty(len(items), dtype=torch.float64)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = collate([items[index] for index in chosen])
        cache = copy.deepcopy(past)
        if cache is not None:
            cache.batch_repeat_interleave(len(chosen))
        found[chosen] = mean_by_row(answer_nll(model, batch, cache), batch)
    return found


def _past(model: nn.Module, prefix: Sequence[int]) -> Any:
    causal = without_wrapper(model)
    device = input_device(causal)
    ids = torch.tensor([list(prefix)], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        return decoder(causal)(input_ids=ids, use_cache=True).past_key_values


def quiz(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: int,
    shots: int,
    seed: int = 0,
) -> Quiz:
    """A quiz from records with `question` and `answer`, a list of accepted answers.

    The wrong answers are right ones of other questions, drawn at random, none accepted for this
    question.

    Args:
        records: more than `questions` + `shots`.
        tokenizer: the model's.
        questions: how many are asked.
        shots: how many others come before, with their answers.
        seed: of the choice.
    """
    source = random.Random(seed)
    drawn = source.sample(records, questions + shots)
    answered, asked = drawn[:shots], drawn[shots:]
    lead = "".join(f"Q: {each['question']}\nA: {each['answer'][0]}\n\n" for each in answered)
    choices = []
    for record in asked:
        prompt = tokenizer(f"Q: {record['question']}\nA:", add_special_tokens=False).input_ids
        accepted = {answer.casefold() for answer in record["answer"]}
        pool = sorted({other["answer"][0] for other in drawn})
        others = [answer for answer in pool if answer.casefold() not in accepted]
        offered = [record["answer"][0], *source.sample(others, DISTRACTORS)]
        choices.append([Item(prompt, spaced(tokenizer, answer)) for answer in offered])
    return Quiz(tokenizer(lead).input_ids, choices)


def estimate(values: Tensor) -> dict[str, float]:
    """Mean and its standard error over items, to six digits after the point."""
    values = values.double()
    error = values.std() / len(values) ** 0.5
    return {"mean": round(float(values.mean()), 6), "se": round(float(error), 6)}


def coded_changes(values: Tensor) -> str:
    """Changes of items as whole 1e-4 nats, in one line of a file that is to be read by people."""
    return " ".join(str(round(1e4 * float(value))) for value in values)


def decoded_changes(text: str) -> Tensor:
    """What `coded_changes` was given, (items,) float64, to its precision."""
    return torch.tensor([int(value) for value in text.split()], dtype=torch.float64) / 1e4
