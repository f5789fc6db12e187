"""How calibration text is cut up where the command line leaves it open."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from corda_kernels.cli import app
from corda_kernels.cli.options import text_batches, text_provenance
from corda_kernels.errors import ConfigError
from corda_kernels.text import fitting_batch_size

OTHERS: dict[str, Any] = {
    "field": None,
    "template": None,
    "chat_template": False,
    "answers_only": False,
    "pack": True,
    "seed": 0,
}


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
    given |= OTHERS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words())
    batches = text_batches(given | {"device": "cpu"}, tokenizer)
    assert fitting_batch_size(8, 4) == 4
    assert [len(batch["input_ids"]) for batch in batches] == sizes
    assert text_provenance(given)["samples"] == 16


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = OTHERS | {"data": "-", "samples": 1, "candidates": 1, "seq_len": 4, "batch_size": 1}
    given["device"] = "cpu"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w1 w2 w3 w4")))
    (batch,) = text_batches(given, tokenizer)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert text_provenance(given)["file"] == "-"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--data - is read once, but each rank reads"):
        text_batches(given, tokenizer)


def test_answers_only_is_an_option_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = ["calibrate", str(tmp_path), "out", "--data", "-", "--answers-only", "--help"]
    assert CliRunner().invoke(app, command).exit_code == 0
    layout = ["init", str(tmp_path), "out", "--mode", "ipm", "--cov", "c", "--answers-only"]
    found = CliRunner().invoke(app, layout)
    assert isinstance(found.exception, ConfigError)
    assert "--answers-only" in str(found.exception)


def _words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(7)} | {"?": 7}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
