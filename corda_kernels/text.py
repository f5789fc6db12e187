"""Documents → token batches, packed or padded."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corda_kernels.arguments import flag, shown, whole_number
from corda_kernels.documents import Document, Layout, documents_of
from corda_kernels.errors import ConfigError, DataError, DataWarning, warn
from corda_kernels.sources import Data, data_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of prose average four to five characters: at six a document seldom falls short.
_CHARS_PER_TOKEN = 6
# What is behind so many characters for each token that is asked for need not be read: a tokenizer
# takes minutes for a document of many megabytes.
_CHARS_OF_LONG_TOKENS = 100


def token_batches(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    seq_len: int = 2048,
    batch_size: int | Callable[[int], int] = 1,
    field: str | None = None,
    template: str | None = None,
    chat_template: bool = False,
    answers_only: bool = False,
    pack: bool = True,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Turns text, from a file or elsewhere, into batches of token ids.

    Every document is tokenised with the tokenizer's defaults: a tokenizer that puts a BOS token
    before a text does so for each document, as its model saw documents in training. The output of a
    chat template is taken as it is, because it contains its special tokens.


    Args:
        data: a file, the name of a hub data set, "-" for standard input, a `datasets.Dataset`, or
            an iterable of texts and records; see `corda_kernels.documents.read_texts`.
        tokenizer: the model's tokenizer.
        samples: number of sequences.
        seq_len: number of tokens in each sequence; the most if `pack` is off.
        batch_size: number of sequences in each batch (the last may have fewer), or a function that
            computes it from the number of sequences found, such as one of `fitting_batch_size`.
        field: name of a record's field that holds the text; by default "text".
        template: text with names of fields in braces, in place of `field`.
        chat_template: whether to lay out each document as a conversation, by the tokenizer's chat
            template.
        answers_only: whether the assistant's turns alone count, with the tokens that close them;
            the model reads the rest as context. Needs conversations and `chat_template`.
        pack: whether to join the documents, each closed by EOS if the tokenizer has one, and cut
            them into full sequences. Otherwise each document is a sequence of its own, cut off at
            `seq_len` and padded on the right, without EOS.
        seed: random seed of the order in which documents are taken.

    Returns:
        Batches with `input_ids` (batch, seq) int64; if `pack` is off, `attention_mask` (batch, seq)
        int64; with `answers_only`, `token_mask` (batch, seq) bool. If the text runs out, there are
        fewer samples, with a DataWarning; packing leaves out a last short piece, unless there is
        nothing else.

    Raises:
        ConfigError: an option has a value that is not allowed, both `field` and `template` are
            given, or `answers_only` is combined with options that it excludes.
        DataError: the data cannot be read, holds no text, or does not have the fields asked for; or
            the answers cannot be found in the output of the chat template.

        MissingExtraError: the data needs the library datasets, which is not installed.
    """
    _check_positive(samples=samples, seq_len=seq_len)
    if not callable(batch_size):
        _check_positive(batch_size=batch_size)
    flag("chat_template", chat_template)
    flag("answers_only", answers_only)
    flag("pack", pack)
    if not callable(tokenizer):
        raise DataError(
            f"a tokenizer is needed, got {shown(tokenizer)}: load_tokenizer gives a model's own"
        )
    if answers_only and (not chat_template or field is not None or template is not None):
        raise ConfigError(
            "answers_only counts the assistant's turns of conversations: give chat_template=True "
            "(--chat-template) with it, and neither field nor template"
        )
    if answers_only and not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot tell which text a token stands for, which "
            "answers_only needs: take a fast tokenizer (tokenizer.json)"
        )
    layout = Layout(field, template, tokenizer if chat_template else None, answers_only)
    name = data_name(data)
    documents = documents_of(data, layout, _CHARS_PER_TOKEN * seq_len, seed)
    most = _CHARS_OF_LONG_TOKENS * seq_len * (samples if pack else 1)
    shortened = ((text[:most], answers) for text, answers in documents)
    tokenized = _tokenized(shortened, tokenizer, layout, pack)
    if pack:
        sequences = _packed(tokenized, samples, seq_len)
    else:
        some = itertools.islice(tokenized, min(samples, sys.maxsize))
        sequences = [(ids[:seq_len], counted[:seq_len]) for ids, counted in some]
    complete = sum(len(ids) == seq_len for ids, _ in sequences) if pack else len(sequences)
    if not sequences:
        raise DataError(f"{name}: every document in it is empty; check --field or --template")
    if complete < samples:
        warn(
            f"{name} is used up after {complete} of {samples} sequences of {seq_len} tokens "
            f"({sum(len(ids) for ids, _ in sequences)} tokens in all): give more text, or lower "
            "--samples or --seq-len",
            DataWarning,
        )
    size = batch_size(len(sequences)) if callable(batch_size) else batch_size
    _check_positive(batch_size=size)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in known if token is not None)
    batches = []
    for first in range(0, len(sequences), size):
        ids, counted = zip(*sequences[first : first + size], strict=True)
        batch = {"input_ids": _padded(ids, pad)}
        if not pack:
            batch["attention_mask"] = _padded([[1] * len(row) for row in ids], 0)
        if answers_only:
            batch["token_mask"] = _padded(counted, 0)
        batches.append(batch)
    return batches


def fitting_batch_size(samples: int, seq_len: int, device: str = "cpu") -> int:
    """How many sequences to run at a time: on a CPU so many that they make about 2,048 tokens.

    With fewer, every product reads all of its weight, and every covariance is read and written, for
    a few hundred tokens: on 2 CPU cores SmolLM2-135M is calibrated in 20.6 s with 512 tokens at a
    time, in 19 s with 1,024, and in 18.6 s with 2,048 or 4,096. A GPU takes 8,192, by a model of
    its kernels alone.

    There are an even number of batches, all of this size but the last, so that the halves of the
    text differ by a few sequences at most.

    Args:
        samples: number of sequences.
        seq_len: tokens in each.
        device: type of the device that they run on.

    Raises:
        ConfigError: a count is not positive.
    """
    _check_positive(samples=samples, seq_len=seq_len)
    most = max(1, (2_048 if device == "cpu" else 8_192) // seq_len)
    count = 2 * math.ceil(samples / (2 * most))
    return math.ceil(samples / count)


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        whole_number(name, count, 1)


def _tokenized(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    close: bool,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each document, and whether they count if that is not all of them."""
    special, asked = layout.chat_tokenizer is None, layout.answers_only
    options = {"return_offsets_mapping": True} if asked else {}
    eos = tokenizer.eos_token_id
    for text, answers in documents:
        # Not verbose: a document longer than the model's context is no fault here, it gets cut.
        made = tokenizer(text, add_special_tokens=special, verbose=False, **options)
        ids = list(made["input_ids"])
        if not ids:
            continue
        counted = _within(made["offset_mapping"], answers, len(text)) if asked else []
        # A chat template may close with EOS and a line feed, some tokenizers with EOS.
        closed = ids[-1] == eos or eos is None or text.rstrip().endswith(tokenizer.eos_token)
        if close and not closed:
            ids.append(eos)
            counted += [False] * asked
        yield ids, counted


def _within(
    offsets: Iterable[tuple[int, int]], spans: Iterable[tuple[int, int]], length: int
) -> list[bool]:
    """Whether each token, characters `start` to `end` of a text, has a character in the spans."""
    inside = bytearray(length)
    for first, last in spans:
        inside[first:last] = b"\1" * len(inside[first:last])
    # Some tokenizers leave white space out of a token's offsets: one of nothing else ends there.
    return [inside.find(1, max(min(start, end - 1), 0), end) >= 0 for start, end in offsets]


def _packed(
    documents: Iterable[tuple[list[int], list[bool]]], samples: int, seq_len: int
) -> list[tuple[list[int], list[bool]]]:
    stream: list[int] = []
    counted: list[bool] = []
    for ids, flags in documents:
        stream += ids
        counted += flags
        if len(stream) >= samples * seq_len:
            break
    count = min(samples, len(stream) // seq_len) or 1
    pieces = [slice(i * seq_len, (i + 1) * seq_len) for i in range(count) if stream]
    return [(stream[piece], counted[piece]) for piece in pieces]


def _padded(rows: Iterable[Sequence[int]], padding: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=padding)
