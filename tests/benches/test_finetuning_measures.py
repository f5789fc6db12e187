from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from finetuning.data import Item, collate
from finetuning.likelihood import answer_nll
from finetuning.measures import DISTRACTORS, Examination, Quiz, estimate, item_nll, quiz
from torch import nn

ITEMS = [Item([3, 4, 5], [6, 7]), Item([8], [9]), Item([10, 11, 12, 13, 14], [15, 16, 17])]


class Words:
    """A tokenizer of words that are numbers; all others are 1."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Words:
        self.input_ids = [int(word) if word.isdigit() else 1 for word in text.split()]
        return self


@pytest.fixture
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model("llama", initializer_range=0.3)


@torch.no_grad()
def alone(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    """The plain definition: one item, all logits, in float64."""
    ids = torch.tensor([prompt + answer])
    scores = model.double()(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    model.float()
    picked = scores[range(len(scores)), ids[0, 1:]]
    return -float(picked[len(prompt) - 1 :].mean())


@pytest.mark.parametrize("batch_size", [2, 8])
def test_an_items_likelihood_does_not_depend_on_its_batch(
    model: nn.Module, batch_size: int
) -> None:
    expected = [alone(model, item.prompt, item.answer) for item in ITEMS]
    assert item_nll(model, ITEMS, batch_size).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_prefix_counts_as_if_it_stood_before_each_item(model: nn.Module) -> None:
    prefix = [20, 21, 22]
    expected = [alone(model, prefix + item.prompt, item.answer) for item in ITEMS]
    assert item_nll(model, ITEMS, 2, prefix).tolist() == pytest.approx(expected, rel=1e-5)
    without = item_nll(model, ITEMS, 2).tolist()
    assert without != pytest.approx(expected, rel=1e-3)


def test_the_loss_is_a_mean_over_answer_tokens_only(model: nn.Module) -> None:
    batch = collate(ITEMS)
    nll = answer_nll(model, batch)
    assert nll.shape == (6,)
    totals = [len(item.answer) * alone(model, item.prompt, item.answer) for item in ITEMS]
    assert float(nll.detach().sum()) == pytest.approx(sum(totals), rel=1e-5)


def test_the_right_answers_rank_counts_the_more_probable_ones(model: nn.Module) -> None:
    choices = [[Item([3], [token]) for token in tokens] for tokens in ([4, 5, 6], [7, 5, 6])]
    exam = Examination([], Quiz([2], choices), torch.empty(0), ranked=2, batch_size=4)
    expected = []
    for tokens in choices:
        right, *wrong = (alone(model, [2, *item.prompt], item.answer) for item in tokens)
        expected.append(sum(each < right for each in wrong))
    assert exam.rank(model).tolist() == expected
    assert len(set(expected)) == 2, "of these tokens the test would see no difference"


def test_an_examination_measures_all_three(model: nn.Module) -> None:
    text = torch.arange(3, 19).reshape(2, 8)
    exam = Examination(ITEMS[:2], Quiz([2], [[ITEMS[2]]]), text, ranked=1)
    found = exam.take(model)
    assert {name: len(values) for name, values in found.items()} == {
        "task": 2,
        "knowledge": 1,
        "text": 2,
    }
    expected = [alone(model, ids[:1], ids[1:]) for ids in text.tolist()]
    assert found["text"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_quiz_offers_nine_wrong_answers_and_asks_none_of_its_shots() -> None:
    records = [{"question": f"{100 + i}", "answer": [f"{200 + i}", "300"]} for i in range(30)]
    made = quiz(records, Words(), questions=12, shots=3)
    assert len(made.choices) == 12
    shown = {token for token in made.shots if token >= 200}
    assert len(shown) == 3
    for right, *wrong in made.choices:
        assert len(wrong) == DISTRACTORS
        assert right.answer == [right.prompt[1] + 100]
        offered = {tuple(item.answer) for item in wrong}
        assert len(offered) == DISTRACTORS
        assert tuple(right.answer) not in offered
        assert right.answer[0] not in shown
        assert all(item.prompt == right.prompt for item in wrong)


def test_an_accepted_answer_is_no_wrong_one() -> None:
    records = [
        {"question": "1", "answer": [f"{200 + i}", f"{200 + (i + 1) % 12}"]} for i in range(12)
    ]
    for right, *wrong in quiz(records, Words(), questions=12, shots=0).choices:
        accepted = 200 + (right.answer[0] - 199) % 12
        assert [accepted] not in [item.answer for item in wrong]


def test_an_estimate_is_the_mean_and_its_standard_error() -> None:
    assert estimate(torch.tensor([1.0, 2.0, 4.0])) == {
        "mean": pytest.approx(7 / 3, abs=1e-6),
        "se": pytest.approx(math.sqrt(7 / 9), abs=1e-5),
    }
