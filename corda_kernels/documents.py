"""Texts and records → documents: fields, templates, conversations, in a seeded random order."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from corda_kernels.arguments import instance_of, seed_number, whole_number
from corda_kernels.chat import LAYOUTS, conversation, laid_out
from corda_kernels.errors import ConfigError, DataError
from corda_kernels.sources import JSON_SUFFIXES, Data, data_name, items_of, record_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ESCAPE = re.compile(r"\\(?:[abfnrtv'\"\\]|x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8})?")
# Of a template: a brace that is written twice, a field with its indices and keys, or a mistake.
_FIELD = re.compile(
    r"\{\{|\}\}|\{(?!\d+[\[}])(?P<name>[^.!:\[\]{}]+)(?P<keys>(\[[^\[\]{}]+\])*)\}|(?P<odd>[{}])"
)


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

    A file's name, without a final .gz, says how to read it:

    - .jsonl, .ndjson, .json: one object, and so one document, a line (blank lines are ignored), or
      an array of objects or texts;
    - .csv, .tsv, .parquet, .arrow: one document a row;
    - anything else is UTF-8 text, in which a document is a run of whole paragraphs.

    Args:
        data: a file; "-" for standard input, which is read as JSON if it begins as JSON does, else
            as text; if there is no such file, a data set of the hub with its split, "name:split" or
            "name:configuration:split"; or a `datasets.Dataset`, or another iterable of texts and
            records. An iterable without a length is read in its own order, as far as needed.
        field: name of the field that holds the text; by default "text".
        template: text with fields in braces, such as "Q: {question}\\nA: {answer[0]}", in place
            of `field`. Braces take names, list indices and keys; a literal brace is written twice.
        chat_tokenizer: tokenizer whose chat template lays out each document. Without `field` and
            `template` this is the record's conversation, with its `tools`: `messages`;
            `conversations` (ShareGPT); or `prompt` and `completion`, texts or lists of messages.
            Any other text becomes a user's message.
        min_chars: length from which a document of plain text ends at the next blank line. Text
            without blank lines is cut at a line end instead, at the latest after four times that
            length.
        seed: random seed of the documents' order; None keeps the data's.

    Raises:
        ConfigError: both `field` and `template` are given, or an option has a value that is not
            allowed.
        DataError: the data, the template or the tokenizer cannot be used; or, while iterating, a
            document is no record or does not fit the template, with its line or number.

        MissingExtraError: the data needs the library datasets, which is not installed.
    """
    layout = Layout(field, template, chat_tokenizer)
    return (text for text, _ in documents_of(data, layout, min_chars, seed))


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


class Layout(NamedTuple):
    """How a record becomes a text; see `token_batches`."""

    field: str | None
    template: str | None
    chat_tokenizer: PreTrainedTokenizerBase | None
    answers_only: bool = False


# A document's text, and the spans of it that are the assistant's turns where those are asked for.
Document = tuple[str, Sequence[tuple[int, int]]]


def documents_of(
    data: Data, layout: Layout, min_chars: int, seed: int | None
) -> Iterator[Document]:
    """The documents in their order, without blank ones; what can be checked is checked at once."""
    whole_number("min_chars", min_chars, 1)
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
    items: Any = items_of(data, min_chars)
    numbered: Iterable[tuple[int, Any]] = enumerate(items)
    if hasattr(items, "__len__") and hasattr(items, "__getitem__"):
        order: Sequence[int] = range(len(items))
        if seed is not None:
            order = random.Random(seed).sample(order, len(order))
        numbered = ((index, items[index]) for index in order)
    records = (record_of(item, index, data_name(data)) for index, item in numbered)
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


def _document(record: str | Mapping[str, Any], where: str, layout: Layout) -> Document:
    """A record's text, and its answers if they are asked for."""
    tokenizer = layout.chat_tokenizer
    messages = tools = None
    if isinstance(record, Mapping) and tokenizer is not None:
        tools = record.get("tools")
        if layout.field is None and layout.template is None:
            messages = conversation(record, where)
    answers: list[tuple[int, int]] = []
    if messages is None:
        text = _text(record, where, layout)
        messages = [{"role": "user", "content": text}] if text.strip() else []
    if messages and tokenizer is not None:
        counted = layout.answers_only
        text, answers = laid_out(messages, tokenizer, where, tools=tools, answers=counted)
    # JSON may escape half of a surrogate pair, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode("utf-8"), answers


def _text(record: str | Mapping[str, Any], where: str, layout: Layout) -> str:
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
                f"give JSON lines, one object a document, in a file named *{JSON_SUFFIXES[0]}"
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
                f"field or template (--field, --template; --chat-template reads {LAYOUTS})"
            ) from error
    if value is None or isinstance(value, list | dict):
        item = next(iter(value or ["key"])) if isinstance(value, dict) else 0
        raise DataError(
            f"{where}: '{name}' is a {type(value).__name__}, not a text; choose another field, or "
            f"one item with --template, such as {{{name}[{item}]}}"
        )
    return str(value)
