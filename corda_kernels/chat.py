"""Conversations: how records hold them, what a chat template makes of them, where answers stand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corda_kernels.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS = "'messages', 'conversations' (ShareGPT), or 'prompt' and 'completion'"
# ShareGPT's names of roles that chat templates call otherwise.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation(record: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The messages of a record as a chat template takes them; None where it holds none.

    Raises:
        DataError: they are malformed, or have a role that is not known.
    """
    given: Any = None
    if key := next((key for key in ("messages", "conversations") if key in record), ""):
        given = record[key]
    elif record.keys() >= {"prompt", "completion"}:
        key = "prompt and completion"
        sides = {"user": record["prompt"], "assistant": record["completion"]}
        turns = [
            [{"role": role, "content": side}] if isinstance(side, str) else side
            for role, side in sides.items()
        ]
        if all(isinstance(turn, list) for turn in turns):
            given = turns[0] + turns[1]
    else:
        return None
    if not isinstance(given, list) or not given or not all(map(_is_message, given)):
        shape = "texts or lists" if " and " in key else "a list"
        raise DataError(
            f"{where}: '{key}' must be {shape} of objects with role and content (ShareGPT: from "
            "and value)"
        )
    messages = [_message(each, where) for each in given]
    system = record.get("system")
    if key == "conversations" and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _is_message(given: object) -> bool:
    return isinstance(given, dict) and ("role" in given or given.keys() >= {"from", "value"})


def _message(given: dict[str, Any], where: str) -> dict[str, Any]:
    if "role" not in given:
        role = _ROLES.get(given["from"], given["from"])
        if role not in _KNOWN_ROLES:
            raise DataError(
                f"{where}: the role {role!r} of a message is not known: rename it to one of "
                f"{', '.join((*_ROLES, *_KNOWN_ROLES))}"
            )
        return {"role": role, "content": given["value"]}
    # A table has all columns in all rows: what a message does not have is None there. transformers
    # leaves it out too, but not where it is asked for the generation marks.
    return {name: value for name, value in given.items() if value is not None}


def laid_out(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    tools: Any = None,
    answers: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the tokenizer's chat template lays it out.

    Returns:
        Its text, and the spans of the assistant's turns in it if `answers` are asked for: what
        stands within the template's generation marks if it has them, else what follows the
        generation prompt to the end of the turn.

    Raises:
        DataError: the template refuses it, or shows an answer otherwise than it does alone.
    """

    def text(count: int | None = None, **options: Any) -> str:
        try:
            made = tokenizer.apply_chat_template(
                messages[:count], tools=tools or None, tokenize=False, **options
            )
        except Exception as error:  # a template is its author's code: it may raise anything
            says = f"{where}: the tokenizer's chat template refuses it: {first_line(error)}"
            raise DataError(says) from error
        return str(made)

    whole = text()
    if not answers:
        return whole, []
    template = tokenizer.get_chat_template(tools=tools or None)
    if _MARKS.search(template):
        from transformers.utils.chat_template_utils import render_jinja_template

        options = tokenizer.special_tokens_map
        _, (spans,) = render_jinja_template(
            [messages], tools or None, None, template, return_assistant_tokens_mask=True, **options
        )
        return whole, spans
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not turn:
            raise DataError(
                f"{where} begins with an answer, for which there is no context: leave it out"
            )
        before, ended = text(turn), text(turn + 1)
        # The prompt may end in what a finished turn does not have, such as <think>.
        begun = zip(whole, text(turn, add_generation_prompt=True), strict=False)
        start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], begun))
        end = len(ended) if whole.startswith(ended) else _end(whole, start, ended, message)
        if end is None or start < len(before):
            raise DataError(
                f"{where}: the chat template changes turn {turn} (counted from 0) when other turns "
                "follow, so that the answer cannot be located: take a template with {% generation "
                "%} marks, or give each answer as a conversation of its own"
            )
        spans.append((start, end))
    return whole, spans


def _end(whole: str, start: int, ended: str, message: Mapping[str, Any]) -> int | None:
    """The end of a turn that begins at `start`, where a later one changes what stands before it.

    Some templates show an answer's reasoning in the last turn only. Its content, and what closes
    it when it is the last, stand there all the same.
    """
    content = str(message.get("content") or "").strip()
    at = whole.find(content, start)
    closing = ended.rpartition(content)[2] if content else ""
    end = at + len(content) + len(closing)
    return end if content and at >= 0 and whole[:end].endswith(content + closing) else None
