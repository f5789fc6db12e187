"""Calibration text → token batches: text, JSON, tables, data sets, templates, chat, packing.

`read_texts` yields documents in a seeded random order, `token_batches` tokenises as many of them as
are needed. A JSON line is parsed only when its turn comes. Tables and the hub are read by the
library datasets.
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
from corda_kernels.chat import LAYOUTS, conversation, laid_out
from corda_kernels.errors import ConfigError, DataError, DataWarning, MissingExtraError, warn
from corda_kernels.outputs import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# What `read_texts` and `token_batches` take.
Data = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]

_STDIN = "-"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# Standard input has no name that tells: an object or an array of objects or strings begins so.
_JSON = re.compile(r"\s*(\{\s*\"|\[\s*[{\"])")
# A data set on the hub: its name, a configuration if it has several, a split or a slice of one.
_HUB = re.compile(r"([^:]+)(?::([^:\[\]]+))?:([\w.+]+(?:\[.*\])?)")
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

    Every document is tokenised as the tokenizer does by default: one that puts a BOS token before
    a text does so here for each document, which is how its model saw documents in training. Only
    the output of a chat template is taken as it is, since it writes its own special tokens.

    Args:
        data: see `read_texts`, as for `field` and `template`.
        tokenizer: the model's tokenizer.
        samples: number of sequences.
        seq_len: tokens a sequence; at most that many where `pack` is off.
        batch_size: sequences a batch, or a function that gives it for the number of sequences that
            were found; the last batch may have fewer. `fitting_batch_size` knows a good one.
        field: name of the field that holds the text.
        template: the text with fields in braces.
        chat_template: lays out each document as a conversation, by the tokenizer's chat template.
        answers_only: lets the assistant's turns alone count, with the tokens that close them; the
            model reads the rest as their context. It takes conversations and `chat_template`.
        pack: joins the documents, each closed by EOS if the tokenizer has one, and cuts them into
            full sequences. Otherwise each document is a sequence of its own, cut off at `seq_len`
            and padded on the right, without EOS.
        seed: of the random order in which documents are taken.

    Returns:
        Batches with `input_ids` (batch, seq) int64; where `pack` is off, `attention_mask`
        (batch, seq) int64; with `answers_only`, `token_mask` (batch, seq) bool. Fewer samples than
        asked for, with a DataWarning, if the text runs out: its last short piece is left out when
        packing, unless there is nothing else.

    Raises:
        ConfigError: a count is not positive, another option is none, both `field` and `template`
            are given, or `answers_only` does not go with the others.
        DataError: the data cannot be read, holds no text, or does not fit what was asked; or the
            answers cannot be told in what the chat template makes of a conversation.
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
    layout = _Layout(field, template, tokenizer if chat_template else None, answers_only)
    name = _name(data)
    documents = _documents(data, layout, _CHARS_PER_TOKEN * seq_len, seed)
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


def read_texts(
    data: Data,
    *,
    field: str | None = None,
    template: str | None = None,
    chat_tokenizer: PreTrainedTokenizerBase | None = None,
    min_chars: int = 12288,
    seed: int | None = None,
) -> Iterator[str]:
    """Yields the documents of a file or another source, without blank ones.

    What a file holds is told by its name, before a final .gz if it is compressed:

    - .jsonl, .ndjson, .json: one object and so one document a line, where blank lines are ignored,
      or an array of objects or texts;
    - .csv, .tsv, .parquet, .arrow: one document a row;
    - anything else is UTF-8 text, in which a document is a run of whole paragraphs.

    Args:
        data: the file; or "-" for standard input, which holds JSON if it begins like it, else text;
            or, where there is no such file, a data set of the hub with its split, "name:split" or
            "name:configuration:split"; or a `datasets.Dataset`, or any other iterable of texts and
            records. One that has no length is read in its own order, as far as needed.
        field: name of the field that holds the text; "text" if there is no template either.
        template: text with fields in braces, such as "Q: {question}\\nA: {answer[0]}": names,
            list indices and keys, nothing else. A literal brace is written twice.
        chat_tokenizer: lays out each document by its chat template. Where neither `field` nor
            `template` is given that is the record's conversation: its `messages`; `conversations`
            (ShareGPT); or `prompt` and `completion`, texts or lists of messages. Its `tools` go
            along. Any other text becomes a user's message.
        min_chars: length from which a document of plain text ends at the next blank line. Text
            without blank lines is cut at a line end instead, or at the latest after four times
            that length.
        seed: of the random order of the documents; None keeps the data's.

    Raises:
        ConfigError: both `field` and `template` are given, or an option is not possible.
        DataError: the data, the template or the tokenizer is not usable; while iterating, that a
            document is not a record or does not fit, with its line or number.
        MissingExtraError: the data needs the library datasets, which is not installed.
    """
    layout = _Layout(field, template, chat_tokenizer)
    return (text for text, _ in _documents(data, layout, min_chars, seed))


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


class _Layout(NamedTuple):
    """How a record becomes a text; see `token_batches`."""

    field: str | None
    template: str | None
    chat_tokenizer: PreTrainedTokenizerBase | None
    answers_only: bool = False


class _Line(NamedTuple):
    """A line of JSON, parsed when its turn comes."""

    number: int
    text: str


# A document's text, and the spans of it that are the assistant's turns where those are asked for.
_Document = tuple[str, Sequence[tuple[int, int]]]


def _documents(
    data: Data, layout: _Layout, min_chars: int, seed: int | None
) -> Iterator[_Document]:
    """The documents in their order, without blank ones; what can be checked is checked at once."""
    _check_positive(min_chars=min_chars)
    if seed is not None:
        seed_number("seed", seed)
    for name, given in (("field", layout.field), ("template", layout.template)):
        instance_of(name, given, (str, type(None)))
    if layout.field is not None and layout.template is not None:
        raise ConfigError("field and template exclude each other: a template names its own fields")
    if layout.template is not None:
        _check_template(layout.template)
    if layout.chat_tokenizer is not None and not layout.chat_tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template: leave --chat-template out, or take the "
            "tokenizer of an instruction-tuned model"
        )
    items: Any = _items(data, min_chars)
    numbered: Iterable[tuple[int, Any]] = enumerate(items)
    if hasattr(items, "__len__") and hasattr(items, "__getitem__"):
        order: Sequence[int] = range(len(items))
        if seed is not None:
            order = random.Random(seed).sample(order, len(order))
        numbered = ((index, items[index]) for index in order)
    records = (_record(item, index, _name(data)) for index, item in numbered)
    documents = (_document(record, where, layout) for where, record in records)
    return (document for document in documents if document[0].strip())


def _check_template(template: str) -> None:
    matches = list(_FIELD.finditer(template))
    for odd in [match.start() for match in matches if match["odd"]]:
        raise DataError(
            f"template {template!r}: what begins with {template[odd : odd + 20]!r} must be "
            "{name}, {name[0]} or {name[key]}; a literal brace is written twice"
        )
    if not any(match["name"] for match in matches):
        raise DataError(f"template {template!r} names no field, such as {{question}}")


def _name(data: Data) -> str:
    """What messages call the data."""
    if isinstance(data, str | os.PathLike):
        return "standard input" if os.fspath(data) == _STDIN else str(data)
    return "the data"


def _items(data: Data, min_chars: int) -> Iterable[Any]:
    """Texts, records, or lines of JSON to be parsed."""
    if not isinstance(data, str | os.PathLike):
        if not isinstance(data, Iterable) or hasattr(data, "keys"):
            raise DataError(
                f"data must be a path, a datasets.Dataset, or texts or records in a list or "
                f"another iterable, got {shown(data)}: of several splits give one, such as "
                'data["train"], of a DataFrame to_dict("records")'
            )
        return data
    path = readable_path(data, DataError)
    hub = None if path.exists() else _HUB.fullmatch(os.fspath(data))
    if hub is not None:
        name, configuration, split = hub.groups()
        return _loaded(name, _name(data), split=split, name=configuration)
    kind = Path(str(path).lower().removesuffix(".gz")).suffix
    if kind in _TABLES and path.is_file():
        options = {"sep": "\t"} if kind == ".tsv" else {}
        file = glob.escape(os.fspath(path.absolute()))  # datasets takes it for a pattern
        return _loaded(_TABLES[kind], _name(data), split="train", data_files=file, **options)
    content = _read(path, _name(data))
    if os.fspath(data) == _STDIN and _JSON.match(content):
        kind = _JSON_SUFFIXES[0]
    if kind not in _JSON_SUFFIXES:
        return _spans(content, min_chars)
    if content.lstrip().startswith("["):
        return _parse(content, _name(data), list)
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    return [_Line(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]


def _loaded(builder: str, called: str, /, **options: Any) -> Iterable[Any]:
    """What the library datasets makes of a table or finds on the hub."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f'{called} is read by the library datasets: pip install "corda_kernels[data]"'
        ) from error
    try:
        found: Iterable[Any] = datasets.load_dataset(builder, **options)
    except Exception as error:  # of many libraries beneath it
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n", 1)[0] or type(cause).__name__
        remedy = "check that the file is whole and of the kind that its name says"
        if "data_files" not in options:
            remedy = (
                "check the path; a data set of the hub is written name:split or "
                "name:configuration:split, and takes a network"
            )
        raise DataError(f"{called} cannot be loaded: {reason}; {remedy}") from error
    return found


def _read(path: Path, name: str) -> str:
    try:
        content = sys.stdin.buffer.read() if os.fspath(path) == _STDIN else path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{name}: no such data file; check the path (a data set of the hub is written "
            "name:split)"
        ) from error
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}; give one file of text, JSON, CSV or parquet"
        ) from error
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{name} is compressed and damaged ({error}): make or copy it again"
            ) from error
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text (at byte {error.start}): it is binary or in another "
            "encoding; convert it"
        ) from error
    if "\0" in text:
        raise DataError(f"{name} is binary, not text (it holds NUL); convert it")
    if not text.strip():
        raise DataError(f"{name} is empty: give a file with text")
    return text


def _spans(content: str, min_chars: int) -> list[str]:
    min_chars = min(min_chars, len(content))
    end = f"{{{min_chars},{4 * min_chars}}}?"
    pattern = rf".{end}\n[ \t]*\n|.{end}\n|.{{1,{4 * min_chars}}}"
    return [match[0].strip("\n") for match in re.finditer(pattern, content, re.DOTALL)]


def _record(item: object, index: int, name: str) -> tuple[str, str | Mapping[str, Any]]:
    """A text or record, with where it stands."""
    if isinstance(item, _Line):
        where = f"{name}:{item.number}"
        return where, _parse(item.text, where, dict)
    if isinstance(item, str):
        return name, item
    where = f"record {index} (counted from 0) of {name}"
    if isinstance(item, Mapping):
        return where, item
    raise DataError(f"{where} is {shown(item)}: a text or a record, names with values, is needed")


def _parse(content: str, where: str, kind: type[T]) -> T:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        # The decoder's own line number would contradict the file's.
        wrong = f"is not valid JSON: {str(error).partition(': line ')[0]}"
    else:
        if isinstance(parsed, kind):
            return parsed
        wrong = f"is a JSON {type(parsed).__name__}, not an object"
    raise DataError(
        f"{where} {wrong}; one object a line is expected, or one array of objects in the whole "
        "file (jq -c . writes objects as lines)"
    )


def _document(record: str | Mapping[str, Any], where: str, layout: _Layout) -> _Document:
    """A record's text, and its answers if they are asked for."""
    tokenizer = layout.chat_tokenizer
    messages = tools = None
    if isinstance(record, Mapping) and tokenizer is not None:
        tools = record.get("tools")
        if layout.field is None and layout.template is None:
            messages = conversation(record, where)
    if messages is None:
        text = _text(record, where, layout)
        if tokenizer is None or not text.strip():
            return _without_surrogates(text), []
        messages = [{"role": "user", "content": text}]
    assert tokenizer is not None
    text, answers = laid_out(messages, tokenizer, where, tools=tools, answers=layout.answers_only)
    return _without_surrogates(text), answers


def _without_surrogates(text: str) -> str:
    """JSON may escape half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(record: str | Mapping[str, Any], where: str, layout: _Layout) -> str:
    if layout.answers_only:
        held = "a text" if isinstance(record, str) else ", ".join(record)
        raise DataError(
            f"{where} is no conversation, which answers_only needs: present: {held}; expected: "
            f"{LAYOUTS}"
        )
    if isinstance(record, str):
        if layout.field is not None or layout.template is not None:
            raise DataError(
                f"{where} is plain text and has no fields: leave --field and --template out, or "
                f"give JSON lines, one object a document, in a file named *{_JSON_SUFFIXES[0]}"
            )
        return record
    fields = record

    def value(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match[0][0]
        return _value(fields, [match["name"], *re.findall(r"[^\[\]]+", match["keys"])], where)

    if layout.template is not None:
        return _FIELD.sub(value, layout.template)
    return _value(record, ["text" if layout.field is None else layout.field], where)


def _value(record: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """What the keys lead to in a record, as text."""
    held = [name for name in ("messages", "conversations") if isinstance(record.get(name), list)]
    if held and (keys[0] in held or keys[0] not in record):
        raise DataError(
            f"{where} holds a conversation, '{held[0]}': give --chat-template "
            "(chat_template=True) alone, by which the tokenizer lays it out"
        )
    value: Any = record
    name = ""
    for key in keys:
        name += f"[{key}]" if name else key
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (LookupError, ValueError, TypeError) as error:
            present = f"nothing, a {type(value).__name__} has no items"
            if isinstance(value, list | Mapping):
                each = value if isinstance(value, Mapping) else map(str, range(len(value)))
                present = ", ".join(each) or "nothing"
            raise DataError(
                f"{where} has no field '{name}': present: {present}; choose what there is with "
                f"--field or --template (--chat-template reads {LAYOUTS})"
            ) from error
    if value is None or isinstance(value, list | dict):
        item = next(iter(value or ["key"])) if isinstance(value, dict) else 0
        raise DataError(
            f"{where}: '{name}' is a {type(value).__name__}, not a text; choose another field, or "
            f"one item with --template, such as {{{name}[{item}]}}"
        )
    return str(value)


def _tokenized(
    documents: Iterable[_Document],
    tokenizer: PreTrainedTokenizerBase,
    layout: _Layout,
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


def help_topics(path: str | os.PathLike[str]) -> Path:
    """Writes Python's help topics to a text file: prose and code that every Python carries.

    Raises:
        OutputError: it cannot be written.
    """
    from pydoc_data.topics import topics

    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return Path(path)
