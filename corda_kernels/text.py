"""Calibration text → token batches: plain text, JSON lines, templates, chat, packing.

`read_texts` yields documents in a seeded random order, `token_batches` tokenises as many of them as
are needed. A JSON line is parsed only when its turn comes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corda_kernels.arguments import (
    flag,
    instance_of,
    readable_path,
    seed_number,
    shown,
    whole_number,
)
from corda_kernels.errors import ConfigError, DataError, DataWarning, warn
from corda_kernels.outputs import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_JSON_LINES = f"JSON lines, one object a document, in a file that ends in {_JSON_SUFFIXES[0]}"
# Tokens of prose average four to five characters: at six a document seldom falls short.
_CHARS_PER_TOKEN = 6
# What is behind so many characters for each token that is asked for need not be read: a tokenizer
# takes minutes for a document of many megabytes.
_CHARS_OF_LONG_TOKENS = 100
_ESCAPE = re.compile(r"\\(?:[abfnrtv'\"\\]|x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8})?")
# Of a template: a brace that is written twice, a field with its indices and keys, or a mistake.
_FIELD = re.compile(
    r"\{\{|\}\}|\{(?!\d+[\[}])(?P<name>[^.!:\[\]{}]+)(?P<keys>(\[[^\[\]{}]+\])*)\}|(?P<odd>[{}])"
)


def token_batches(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    seq_len: int = 2048,
    batch_size: int | Callable[[int], int] = 1,
    field: str | None = None,
    template: str | None = None,
    chat_template: bool = False,
    pack: bool = True,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Reads a text or JSON lines file into batches of token ids.

    Every document is tokenised as the tokenizer does by default: one that puts a BOS token before
    a text does so here for each document, which is how its model saw documents in training. Only
    the output of a chat template is taken as it is, since it writes its own special tokens.

    Args:
        path: the file; see `read_texts` for the formats, `field` and `template`.
        tokenizer: the model's tokenizer.
        samples: number of sequences.
        seq_len: tokens a sequence; at most that many where `pack` is off.
        batch_size: sequences a batch, or a function that gives it for the number of sequences that
            were found; the last batch may have fewer. `fitting_batch_size` knows a good one.
        field: name of the JSON field that holds the text.
        template: the text with JSON fields in braces.
        chat_template: lays out each document as a conversation, by the tokenizer's chat template.
        pack: joins the documents, each closed by EOS if the tokenizer has one, and cuts them into
            full sequences. Otherwise each document is a sequence of its own, cut off at `seq_len`
            and padded on the right, without EOS.
        seed: of the random order in which documents are taken.

    Returns:
        Batches with `input_ids` (batch, seq) int64 and, where `pack` is off, `attention_mask`
        (batch, seq) int64. Fewer samples than asked for, with a DataWarning, if the text runs
        out: its last short piece is left out when packing, unless there is nothing else.

    Raises:
        ConfigError: a count is not positive, another option is none, or both `field` and `template`
            are given.
        DataError: the file cannot be read, holds no text, or does not fit what was asked.
    """
    _check_positive(samples=samples, seq_len=seq_len)
    if not callable(batch_size):
        _check_positive(batch_size=batch_size)
    flag("chat_template", chat_template)
    flag("pack", pack)
    if not callable(tokenizer):
        raise DataError(
            f"a tokenizer is needed, got {shown(tokenizer)}: load_tokenizer gives a model's own"
        )
    texts = read_texts(
        path,
        field=field,
        template=template,
        chat_tokenizer=tokenizer if chat_template else None,
        min_chars=_CHARS_PER_TOKEN * seq_len,
        seed=seed,
    )
    most = _CHARS_OF_LONG_TOKENS * seq_len * (samples if pack else 1)
    documents = _tokenized((text[:most] for text in texts), tokenizer, not chat_template, pack)
    if pack:
        sequences = _packed(documents, samples, seq_len)
    else:
        some = itertools.islice(documents, min(samples, sys.maxsize))
        sequences = [ids[:seq_len] for ids in some]
    complete = sum(len(ids) == seq_len for ids in sequences) if pack else len(sequences)
    if not sequences:
        raise DataError(f"{path}: every document in it is empty; check --field or --template")
    if complete < samples:
        warn(
            f"{path} is used up after {complete} of {samples} sequences of {seq_len} tokens "
            f"({sum(map(len, sequences))} tokens in all): give more text, or lower --samples or "
            "--seq-len",
            DataWarning,
        )
    size = batch_size(len(sequences)) if callable(batch_size) else batch_size
    _check_positive(batch_size=size)
    groups = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    if pack:
        return [{"input_ids": torch.tensor(group, dtype=torch.int64)} for group in groups]
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in known if token is not None)
    return [_padded(group, pad) for group in groups]


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


def read_texts(
    path: str | os.PathLike[str],
    *,
    field: str | None = None,
    template: str | None = None,
    chat_tokenizer: PreTrainedTokenizerBase | None = None,
    min_chars: int = 12288,
    seed: int | None = None,
) -> Iterator[str]:
    """Yields the documents of a file, without blank ones.

    A name that ends in .jsonl, .ndjson or .json means JSON lines, one object and so one document a
    line; blank lines are ignored. Anything else is UTF-8 text, in which a document is a run of
    whole paragraphs.

    Args:
        path: the file.
        field: name of the JSON field that holds the text; "text" if there is no template either.
        template: text with JSON fields in braces, such as "Q: {question}\\nA: {answer[0]}": names,
            list indices and keys, nothing else. A literal brace is written twice.
        chat_tokenizer: lays out each document by its chat template: the object's `messages` if it
            has them and neither `field` nor `template` is given, else the text as a user's message.
        min_chars: length from which a document of plain text ends at the next blank line. Text
            without blank lines is cut at a line end instead, or at the latest after four times
            that length.
        seed: of the random order of the documents; None keeps the file's.

    Raises:
        ConfigError: both `field` and `template` are given, or an option is not possible.
        DataError: the file, the template or the tokenizer is not usable; while iterating, that a
            line is not a JSON object or does not fit, with its line number.
    """
    _check_positive(min_chars=min_chars)
    if seed is not None:
        seed_number("seed", seed)
    for name, given in (("field", field), ("template", template)):
        instance_of(name, given, (str, type(None)))
    if field is not None and template is not None:
        raise ConfigError("field and template exclude each other: a template names its own fields")
    if template is not None:
        _check_template(template)
    if chat_tokenizer is not None and not chat_tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template: leave --chat-template out, or take the "
            "tokenizer of an instruction-tuned model"
        )
    kind = readable_path(path, DataError).suffix.lower()
    if kind in _TABLE_SUFFIXES:
        raise DataError(f"{path} is a table, whose lines are no prose: turn it into {_JSON_LINES}")
    content = _read(path)
    records: Iterator[tuple[str, dict[str, Any]]]
    if kind in _JSON_SUFFIXES:
        # Not splitlines: JSON strings may hold U+2028 and its like as they are.
        numbered = enumerate(content.split("\n"), 1)
        lines = [(f"{path}:{number}", line) for number, line in numbered if line.strip()]
        records = ((where, _parse(line, where)) for where, line in _ordered(lines, seed))
    elif field is not None or template is not None:
        raise DataError(
            f"{path} is plain text and has no fields: leave --field and --template out, or give "
            f"{_JSON_LINES}"
        )
    else:
        spans = _ordered(_spans(content, min_chars), seed)
        records = ((str(path), {"text": span}) for span in spans)
    return _rendered(records, field, template, chat_tokenizer)


def decode_escapes(template: str) -> str:
    """Replaces backslash escapes as in a Python string (not octal or named ones).

    For templates typed on a command line, where a line feed is awkward to write.

    Raises:
        DataError: a backslash starts no such escape.
    """

    def decode(match: re.Match[str]) -> str:
        try:
            return match[0].encode("ascii").decode("unicode_escape")
        except UnicodeDecodeError as error:
            escape = template[match.start() : max(match.end(), match.start() + 2)]
            raise DataError(
                f"template {template!r}: {escape!r} is not an escape; write a backslash as two"
            ) from error

    return _ESCAPE.sub(decode, template)


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        whole_number(name, count, 1)


def _check_template(template: str) -> None:
    matches = list(_FIELD.finditer(template))
    for odd in [match.start() for match in matches if match["odd"]]:
        raise DataError(
            f"template {template!r}: what begins with {template[odd : odd + 20]!r} must be "
            "{name}, {name[0]} or {name[key]}; a literal brace is written twice"
        )
    if not any(match["name"] for match in matches):
        raise DataError(f"template {template!r} names no field, such as {{question}}")


def _read(path: str | os.PathLike[str]) -> str:
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file; check the path") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; give one text or JSON lines file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (at byte {error.start}): it is binary, compressed or in "
            "another encoding; convert it"
        ) from error
    if "\0" in content:
        raise DataError(f"{path} is binary, not text (it holds NUL); convert it")
    if not content.strip():
        raise DataError(f"{path} is empty: give a file with text")
    return content


def _spans(content: str, min_chars: int) -> list[str]:
    min_chars = min(min_chars, len(content))
    end = f"{{{min_chars},{4 * min_chars}}}?"
    pattern = rf".{end}\n[ \t]*\n|.{end}\n|.{{1,{4 * min_chars}}}"
    return [match[0].strip("\n") for match in re.finditer(pattern, content, re.DOTALL)]


def _ordered(items: list[Any], seed: int | None) -> list[Any]:
    return items if seed is None else random.Random(seed).sample(items, len(items))


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        # The decoder's own line number would contradict the file's.
        wrong = f"is not valid JSON: {str(error).partition(': line ')[0]}"
    else:
        if isinstance(record, dict):
            return record
        wrong = f"is a JSON {type(record).__name__}, not an object"
    raise DataError(
        f"{where} {wrong}; one object a line is expected (jq -c '.[]' makes such lines of an array)"
    )


def _rendered(
    records: Iterable[tuple[str, dict[str, Any]]],
    field: str | None,
    template: str | None,
    chat_tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[str]:
    whole = chat_tokenizer is not None and field is None and template is None
    for where, record in records:
        messages = record.get("messages")
        if not (whole and "messages" in record):
            text = _document(record, where, field, template)
            if not text.strip():
                continue
            messages = [{"role": "user", "content": text}]
        if chat_tokenizer is not None:
            text = _conversation(messages, where, chat_tokenizer)
        if text.strip():
            # JSON may escape half of a surrogate pair, which no tokenizer takes.
            yield text.encode("utf-8", "replace").decode("utf-8")


def _document(record: dict[str, Any], where: str, field: str | None, template: str | None) -> str:
    def value(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match[0][0]
        return _value(record, [match["name"], *re.findall(r"[^\[\]]+", match["keys"])], where)

    if template is not None:
        return _FIELD.sub(value, template)
    return _value(record, ["text" if field is None else field], where)


def _value(record: dict[str, Any], keys: Sequence[str], where: str) -> str:
    """What the keys lead to in a record, as text."""
    asked = keys[0] == "messages" or keys[0] not in record
    if asked and isinstance(record.get("messages"), list):
        raise DataError(
            f"{where} holds a conversation, 'messages': give --chat-template (chat_template=True) "
            "alone, by which the tokenizer lays it out"
        )
    value: Any = record
    name = ""
    for key in keys:
        name += f"[{key}]" if name else key
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (LookupError, ValueError, TypeError) as error:
            present = f"nothing, a {type(value).__name__} has no items"
            if isinstance(value, list | dict):
                each = value if isinstance(value, dict) else map(str, range(len(value)))
                present = ", ".join(each) or "nothing"
            raise DataError(
                f"{where} has no field '{name}': present: {present}; choose what there is with "
                "--field or --template"
            ) from error
    if value is None or isinstance(value, list | dict):
        item = next(iter(value or ["key"])) if isinstance(value, dict) else 0
        raise DataError(
            f"{where}: '{name}' is a {type(value).__name__}, not a text; choose another field, or "
            f"one item with --template, such as {{{name}[{item}]}}"
        )
    return str(value)


def _conversation(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    listed = messages if isinstance(messages, list) else []
    if not listed or not all(isinstance(each, dict) and "role" in each for each in listed):
        raise DataError(f"{where}: 'messages' must be a list of objects with role and content")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is code of the model's author: it may raise anything
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise DataError(f"{where}: the tokenizer's chat template refuses it: {reason}") from error


def _tokenized(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool, close: bool
) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    for text in texts:
        # Not verbose: a document longer than the model's context is no fault here, it gets cut.
        ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        if not ids:
            continue
        # A chat template may close with EOS and a line feed, some tokenizers with EOS.
        closed = ids[-1] == eos or eos is None or text.rstrip().endswith(tokenizer.eos_token)
        yield [*ids, eos] if close and not closed else list(ids)


def _packed(documents: Iterable[list[int]], samples: int, seq_len: int) -> list[list[int]]:
    stream: list[int] = []
    for ids in documents:
        stream += ids
        if len(stream) >= samples * seq_len:
            break
    count = min(samples, len(stream) // seq_len) or 1
    return [stream[i * seq_len : (i + 1) * seq_len] for i in range(count) if stream]


def _padded(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    kept = [torch.ones_like(row) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    return {"input_ids": input_ids, "attention_mask": pad_sequence(kept, batch_first=True)}


def help_topics(path: str | os.PathLike[str]) -> Path:
    """Writes Python's help topics to a text file: prose and code that every Python carries.

    Raises:
        OutputError: it cannot be written.
    """
    from pydoc_data.topics import topics

    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return Path(path)
