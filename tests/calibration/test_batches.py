from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_kernels.calibration.batches import is_text, token_count, unpadded
from corda_kernels.errors import CalibrationError, PaddingWarning

PAD = 9


@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, 1), max_size=24), seq=st.integers(1, 6))
def test_every_kept_token_comes_once_and_in_its_order(bits: list[int], seq: int) -> None:
    rows = len(bits) // seq
    mask = torch.tensor(bits[: rows * seq], dtype=torch.int64).view(rows, seq)
    ids = torch.arange(mask.numel()).view(mask.shape)
    batch = {"input_ids": ids, "attention_mask": mask}
    found = list(unpadded(batch, 0))
    sequences = [tuple(row) for part in found for row in part["input_ids"].tolist()]
    expected = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
    assert Counter(sequences) == Counter(row for row in expected if row)
    assert len({part["input_ids"].shape[1] for part in found}) == len(found)
    assert token_count(batch) == sum(part["input_ids"].numel() for part in found)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32], ids=str)
def test_a_mask_may_have_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).to(dtype)
    batch = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": mask}
    (part,) = unpadded(batch, 0)
    assert part["input_ids"].tolist() == [[0, 1], [4, 5]]
    assert token_count(batch) == 4


@pytest.mark.parametrize("ids", [torch.arange(6).view(2, 3), torch.arange(3)])
def test_a_batch_without_padding_comes_whole(ids: Tensor) -> None:
    for batch in (ids, {"input_ids": ids}):
        (part,) = unpadded(batch, 0)
        assert torch.equal(part["input_ids"], ids.view(-1, 3))
        assert token_count(batch) == ids.numel()


def test_a_single_sequence_may_be_padded() -> None:
    batch = {"input_ids": torch.arange(4), "attention_mask": torch.tensor([0, 1, 1, 0])}
    (part,) = unpadded(batch, 0)
    assert part["input_ids"].tolist() == [[1, 2]]


def test_what_goes_with_each_token_goes_along() -> None:
    ids = torch.arange(6).view(2, 3)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        "token_type_ids": ids + 10,
        "labels": torch.tensor([0, 1]),
        "inputs_embeds": None,
    }
    assert is_text(batch)
    parts = list(unpadded(batch, 0))
    assert [set(part) for part in parts] == [{"input_ids", "token_type_ids"}] * 2
    assert all(torch.equal(part["token_type_ids"], part["input_ids"] + 10) for part in parts)


def test_what_is_more_than_text_is_not_taken_apart() -> None:
    ids = torch.arange(6).view(2, 3)
    others = {
        "position_ids": torch.tensor([[0, 1, 0], [0, 0, 1]]),  # packed
        "pixel_values": torch.zeros(2, 3, 4, 4),
        "image_sizes": [[4, 4], [4, 4]],
    }
    for name, value in others.items():
        batch = {"input_ids": ids, name: value}
        assert not is_text(batch)
        assert token_count(batch) == 6
    images = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert (is_text(images), token_count(images)) == (False, 2)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3)},
    ],
)
def test_a_batch_without_tokens_yields_nothing(batch: Any) -> None:
    assert list(unpadded(batch, 0)) == []
    assert token_count(batch) == 0


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"inputs": torch.ones(2, 3).long()},
        {"input_ids": [[1, 2]]},
        [1, 2, 3],
        "text",
        torch.ones(2, 3),
        torch.ones(1, 2, 3).long(),
        torch.tensor(3),
    ],
    ids=str,
)
def test_a_batch_without_token_ids_is_refused_by_number(batch: Any) -> None:
    with pytest.raises(CalibrationError, match=r"batch 7 \(counted from 0\) has no token ids"):
        list(unpadded(batch, 7))


@pytest.mark.parametrize("batch", [{}, {"input_ids": [[1, 2]]}, [1, 2, 3], "text"], ids=str)
def test_a_batch_without_token_ids_counts_no_tokens(batch: Any) -> None:
    assert token_count(batch) == 0


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(3), torch.ones(2, 1, 3, 3), [1]])
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(CalibrationError, match=r"batch 7 .* attention_mask .* \(2, 3\)"):
        list(unpadded({"input_ids": torch.ones(2, 3).long(), "attention_mask": mask}, 7))


@pytest.mark.parametrize(
    "ids", [[[1, 2, 3, PAD, PAD], [1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5], [PAD, PAD, 3, 4, 5]]]
)
def test_padding_without_a_mask_is_warned_about(ids: list[list[int]]) -> None:
    with pytest.warns(PaddingWarning, match="batch 7 starts or ends in padding"):
        list(unpadded(torch.tensor(ids), 7, pad_token_id=PAD))


@pytest.mark.parametrize(
    ("batch", "pad"),
    [
        (torch.tensor([[1, 2, 3, PAD]]), PAD),
        (torch.tensor([[PAD, 2, 3, 4]]), PAD),
        (torch.tensor([[1, PAD, PAD, 4]]), PAD),
        (torch.tensor([[PAD]]), PAD),
        (torch.tensor([[1, 2, PAD, PAD]]), None),
        (
            {
                "input_ids": torch.tensor([[1, PAD, PAD]]),
                "attention_mask": torch.tensor([[1, 0, 0]]),
            },
            PAD,
        ),
    ],
)
def test_what_need_not_be_padding_is_not_warned_about(batch: Any, pad: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(unpadded(batch, 0, pad_token_id=pad))
