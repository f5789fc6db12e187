"""How calibration text is cut up where the command line leaves it open."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corda_kernels.cli.options import text_batches, text_provenance
from corda_kernels.text import fitting_batch_size


@pytest.mark.filterwarnings("ignore:.* is used up after 12 of 16")
@pytest.mark.parametrize(
    ("documents", "asked", "sizes"),
    [
        (400, None, [4] * 4),
        (400, 3, [3] * 5 + [1]),
        (24, None, [3] * 4),  # as many as there are, not as were asked for
    ],
)
def test_batches_fit_each_candidate_unless_their_size_is_given(
    tmp_path: Path, documents: int, asked: int | None, sizes: list[int]
) -> None:
    """Two candidates of 8 sequences each, which four sequences at a time divide evenly."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"w{n % 7} w{n % 5}" for n in range(documents)))
    given = {"data": text, "samples": 8, "candidates": 2, "seq_len": 4, "batch_size": asked}
    given |= {"field": None, "template": None, "chat_template": False, "pack": True, "seed": 0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words())
    batches = text_batches(given | {"device": "cpu"}, tokenizer)
    assert fitting_batch_size(8, 4) == 4
    assert [len(batch["input_ids"]) for batch in batches] == sizes
    assert text_provenance(given)["samples"] == 16


def _words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(7)} | {"?": 7}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
