from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetuning.data import Item, collate, gradient_batches, plain_problems, training_batches

from corda_kernels.errors import DataError


def items(count: int) -> list[Item]:
    return [Item([1] * (1 + index % 5), [10 + index]) for index in range(count)]


def answers(batches) -> list[int]:
    return [int(token) for batch in batches for token in batch.ids[batch.answer]]


def test_a_batch_is_padded_on_the_right_and_knows_its_answers() -> None:
    batch = collate([Item([5, 6], [7]), Item([5], [8, 9, 10])])
    assert batch.ids.tolist() == [[5, 6, 7, 0], [5, 8, 9, 10]]
    assert batch.real.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.answer.tolist() == [[False, False, True, False], [False, True, True, True]]


def test_gradients_are_those_of_answers() -> None:
    batches = gradient_batches([Item([5, 6], [7]), Item([5], [8]), Item([4], [9])], 2)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[5, 6, 7], [5, 8, 0]], [[4, 9]]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batches[0]["labels"].tolist() == [[-100, -100, 7], [-100, 8, -100]]


def test_training_takes_every_problem_once_in_the_order_of_the_seed() -> None:
    options = {"steps": 10, "size": 4}
    first = answers(training_batches(items(60), **options, seed=0))
    assert len(first) == len(set(first)) == 40
    assert answers(training_batches(items(60), **options, seed=0)) == first
    assert answers(training_batches(items(60), **options, seed=1)) != first


def test_problems_of_like_length_are_trained_on_together() -> None:
    def padding(batches) -> int:
        return sum(int((~batch.real).sum()) for batch in batches)

    sorted_ = training_batches(items(60), steps=8, size=4, seed=0)
    apart = [collate([item]) for item in items(60)]
    assert padding(apart) == 0
    assert padding(sorted_) <= 32


def test_too_few_problems_are_refused() -> None:
    with pytest.raises(DataError, match=r"need 12, but only 11 .* fewer steps"):
        training_batches(items(11), steps=3, size=4, seed=0)


def test_the_calculators_marks_are_taken_out(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"question": "q", "answer": "48/2 = <<48/2=24>>24.\n#### 24"}) + "\n"
    )
    out = plain_problems(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert json.loads(out.read_text()) == {"question": "q", "answer": "48/2 = 24.\n#### 24"}
