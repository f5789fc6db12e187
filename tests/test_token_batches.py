"""Documents to batches of tokens: order, packing, padding, sizes."""

import json
import warnings
from unittest import TestCase

import numpy as np
import pytest
import torch
from byte_tokenizer import QUESTIONS, all_tokens, byte_tokenizer, write, write_records

from corda_kernels.documents import read_texts
from corda_kernels.errors import ConfigError, CordaWarning, DataError
from corda_kernels.text import fitting_batch_size, token_batches


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class TestSelection:
    def first(self, path, tokenizer, seed):
        batches = token_batches(
            path, tokenizer, samples=4, seq_len=32, template="{question}", seed=seed
        )
        return torch.cat([batch["input_ids"] for batch in batches])

    def test_the_seed_decides(self, tmp_path, tokenizer):
        path = write_records(tmp_path, *QUESTIONS)
        one, same, other = (self.first(path, tokenizer, seed) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_every_document_is_taken_once(self, tmp_path):
        path = write_records(tmp_path, *QUESTIONS)
        in_order = list(read_texts(path, field="question"))
        shuffled = list(read_texts(path, field="question", seed=0))
        assert in_order == [record["question"] for record in QUESTIONS]
        assert shuffled != in_order
        assert sorted(shuffled) == sorted(in_order)

    def test_only_lines_that_are_taken_are_parsed(self, tmp_path, tokenizer):
        lines = [json.dumps({"text": f"document {n:03}"}) for n in range(50)]
        order = list(read_texts(write(tmp_path, "\n".join(lines)), seed=0))
        last = int(order[-1][-3:])
        lines[last] = "{broken"
        path = write(tmp_path, "\n".join(lines))
        assert token_batches(path, tokenizer, samples=2, seq_len=32)
        with pytest.raises(
            DataError, match=rf"data\.jsonl:{last + 1} is not valid JSON: Expecting"
        ):
            token_batches(path, tokenizer, samples=50, seq_len=32)


class TestPacking:
    def test_keeps_every_token_and_closes_every_document(self, tmp_path, tokenizer):
        path = write_records(tmp_path, *QUESTIONS)
        expected = "".join(f"{text}<eos>" for text in read_texts(path, field="question", seed=3))
        total = len(expected.replace("<eos>", "E"))
        batches = token_batches(
            path, tokenizer, samples=total // 16, seq_len=16, batch_size=4, field="question", seed=3
        )
        ids = torch.cat([batch["input_ids"] for batch in batches])
        assert ids.shape == (total // 16, 16)
        assert ids.dtype == torch.int64
        text = tokenizer.decode(ids.flatten())
        assert text == expected[: len(text)]
        assert ids.numel() == total - total % 16
        assert all(set(batch) == {"input_ids"} for batch in batches)
        assert [len(batch["input_ids"]) for batch in batches[:-1]] == [4] * (len(batches) - 1)

    def test_bos_is_put_where_the_tokenizer_puts_it(self, tmp_path):
        tokenizer = byte_tokenizer(layout="<bos> $A")
        path = write_records(tmp_path, {"text": "one"}, {"text": "one"})
        assert all_tokens(path, tokenizer) == "<bos>one<eos>" * 2

    def test_a_text_that_ends_in_eos_is_not_closed_again(self, tmp_path, tokenizer):
        path = write_records(tmp_path, {"text": "one<eos>"}, {"text": "one<eos>\n"})
        assert all_tokens(path, tokenizer).count("<eos>") == 2

    def test_a_tokenizer_that_closes_by_itself_is_left_to_do_so(self, tmp_path):
        tokenizer = byte_tokenizer(layout="$A <eos>")
        path = write_records(tmp_path, {"text": "one"}, {"text": "one"})
        assert all_tokens(path, tokenizer) == "one<eos>" * 2

    def test_a_tokenizer_without_eos_joins_directly(self, tmp_path):
        path = write_records(tmp_path, {"text": "one"}, {"text": "one"})
        assert all_tokens(path, byte_tokenizer(eos=None)) == "oneone"

    def test_the_short_end_is_left_out_and_the_shortage_told(self, tmp_path, tokenizer):
        path = write_records(tmp_path, {"text": "a" * 10}, {"text": "b" * 10})
        message = r"used up after 2 of 5 sequences of 8 tokens \(16 tokens in all\)"
        with pytest.warns(CordaWarning, match=message) as caught:
            batches = token_batches(path, tokenizer, samples=5, seq_len=8)
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 8), (1, 8)]
        assert caught[0].filename == __file__

    def test_the_short_end_is_kept_where_it_is_all(self, tmp_path, tokenizer):
        path = write_records(tmp_path, {"text": "abc"})
        with pytest.warns(CordaWarning, match=r"after 0 of 1 sequences .* \(4 tokens in all\)"):
            (batch,) = token_batches(path, tokenizer, samples=1, seq_len=8)
        assert tokenizer.decode(batch["input_ids"][0]) == "abc<eos>"

    def test_a_document_longer_than_the_context_is_no_warning(self, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.model_max_length = 8
        text = write(tmp_path, "a" * 64, "a.txt")
        with TestCase().assertNoLogs("transformers"):
            token_batches(text, tokenizer, samples=1, seq_len=8)


class TestNoPacking:
    @pytest.mark.parametrize(("eos", "pad"), [("<eos>", "<eos>"), (None, None), ("<eos>", "<pad>")])
    def test_one_document_a_row_with_its_mask(self, tmp_path, eos, pad):
        tokenizer = byte_tokenizer(eos=eos)
        if pad == "<pad>":
            tokenizer.add_special_tokens({"pad_token": pad})
        texts = ["a", "bcd", "efghijkl"]
        path = write_records(tmp_path, *({"text": text} for text in texts))
        batches = token_batches(path, tokenizer, samples=3, seq_len=5, batch_size=2, pack=False)
        pad_id = 0 if pad is None else tokenizer.convert_tokens_to_ids(pad)
        rows = []
        for batch in batches:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            assert ids.dtype == mask.dtype == torch.int64
            assert ids.shape == mask.shape
            assert int(mask.sum(1).max()) == ids.shape[1]
            assert (mask.diff(dim=1) <= 0).all(), "padding is on the right"
            assert (ids[mask == 0] == pad_id).all()
            rows += [
                tokenizer.decode(row[kept.bool()]) for row, kept in zip(ids, mask, strict=True)
            ]
        assert sorted(rows) == ["a", "bcd", "efghi"]
        assert [len(batch["input_ids"]) for batch in batches] == [2, 1]

    def test_a_shortage_is_told(self, tmp_path, tokenizer):
        path = write_records(tmp_path, {"text": "one"}, {"text": ""})
        with pytest.warns(CordaWarning, match="used up after 1 of 2 sequences"):
            token_batches(path, tokenizer, samples=2, pack=False)

    def test_short_documents_are_no_shortage(self, tmp_path, tokenizer):
        path = write_records(tmp_path, {"text": "one"})
        with warnings.catch_warnings(record=True) as caught:
            token_batches(path, tokenizer, samples=1, pack=False)
        assert not caught


def test_what_a_long_document_has_beyond_the_need_is_not_read(tmp_path, tokenizer):
    path = write_records(tmp_path, {"text": "0123456789" * 100_000})
    lengths = []

    def counted(text, **options):
        lengths.append(len(text))
        return tokenizer(text, **options)

    for name in ("eos_token_id", "eos_token", "pad_token_id"):
        setattr(counted, name, getattr(tokenizer, name))
    for pack, most in ((True, 2 * 8 * 100), (False, 8 * 100)):
        batches = token_batches(path, counted, samples=2 - (not pack), seq_len=8, pack=pack)
        assert sum(batch["input_ids"].numel() for batch in batches) == 16 - 8 * (not pack)
        assert lengths.pop() == most


@pytest.mark.parametrize(
    ("samples", "seq_len", "size"),
    [
        *((16, 512, 4), (64, 512, 4), (4, 512, 2), (6, 512, 3), (5, 64, 3), (1, 64, 1)),
        *((8, 4096, 1), (255, 64, 32), (254, 128, 16), (127, 128, 16), (31, 2048, 1)),
    ],
)
def test_a_batch_is_as_large_as_products_are_quick_at(
    samples: int, seq_len: int, size: int
) -> None:
    assert fitting_batch_size(samples, seq_len) == size


def test_a_batch_size_may_follow_from_what_is_found(tokenizer, tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("0123456789" * 4)
    asked = []

    def size(found: int) -> int:
        asked.append(found)
        return 3

    with pytest.warns(CordaWarning, match="used up after 5 of 9"):
        batches = token_batches(path, tokenizer, samples=9, seq_len=8, batch_size=size)
    assert asked == [5]
    assert [len(batch["input_ids"]) for batch in batches] == [3, 2]
    sized = token_batches(path, tokenizer, samples=5, seq_len=8, batch_size=np.int64(2))
    assert [len(batch["input_ids"]) for batch in sized] == [2, 2, 1]
    for wrong in (0, lambda found: 0, lambda found: -1):
        with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
            token_batches(path, tokenizer, samples=5, seq_len=8, batch_size=wrong)


def test_no_batch_fits_no_samples() -> None:
    with pytest.raises(ConfigError, match="samples must be a whole number of at least 1"):
        fitting_batch_size(0, 512)
