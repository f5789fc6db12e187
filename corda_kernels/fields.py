"""What a file's fields may hold.

JSON as Python reads it has NaN and infinities, whole numbers of any size, and truth values that
pass for whole numbers. A field is checked by its exact kind and range.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
# What the fields of an object may hold, see `check_fields`.
Schema = Check | Mapping[str, "Schema"]

# Far more than any file of ours has, far less than Python's recursion takes.
_LEVELS = 50


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, nested too deep, names a field twice, or has text that cannot
            be written again (half of a surrogate pair).
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    _check_text(value, _LEVELS)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice[:40]!r} twice")
    return value


def _check_text(value: Any, levels: int) -> None:
    if not levels:
        raise ValueError("it is nested too deep")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list | dict):
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_text(entry, levels - 1)


def check_fields(value: Any, schema: Mapping[str, Schema], where: str = "it") -> None:
    """Makes sure that a JSON object has certain fields, and nothing else.

    Args:
        value: the object.
        schema: of each field, whether a value is one that it may have, or the schema of an object.
            A field whose name ends in "?" may be missing. "*" alone stands for any names.
        where: what the object is called in messages; an object in it goes by its field's name.

    Raises:
        ValueError: it is no object, or names the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    fields = {name.removesuffix("?"): check for name, check in schema.items()}
    lacking = {name[:-1] for name in schema if name.endswith("?")}
    if "*" in schema:
        fields, lacking = dict.fromkeys(value, schema["*"]), set()
    odd = sorted(map(str, (fields.keys() ^ value.keys()) - lacking))
    if odd:
        raise ValueError(f"field {odd[0][:40]!r} is missing or unknown in {where}")
    for name, entry in value.items():
        check = fields[name]
        if isinstance(check, Mapping):
            check_fields(entry, check, name)
        elif not check(entry):
            raise ValueError(f"{name!r} of {where} cannot be {str(entry)[:40]!r}")


def one_of(*allowed: Any) -> Check:
    """A check for one of these values."""
    return lambda value: value in allowed


def maybe(check: Check) -> Check:
    """A check for null, or what `check` accepts."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """A check for a list of what `check` accepts."""
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


def whole(least: int) -> Check:
    """`is_whole` with this bound."""
    return lambda value: is_whole(value, least)


def number(least: float) -> Check:
    """`is_number` with this bound."""
    return lambda value: is_number(value, least)


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value is a whole number of at least `least` that 64 bits hold."""
    return type(value) is int and least <= value < 2**63


def is_number(value: Any, least: float = -sys.float_info.max) -> bool:
    """Whether a value is a finite number of at least `least`."""
    return type(value) in (int, float) and least <= value <= sys.float_info.max


def is_positive(value: Any) -> bool:
    """Whether a value is a positive finite number."""
    return is_number(value, 0) and value > 0


def is_flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    """Whether a value is an object."""
    return isinstance(value, dict)


def is_text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


def is_names(value: Any) -> bool:
    """Whether a value is a list of different names."""
    return isinstance(value, list) and all(map(is_text, value)) and len(set(value)) == len(value)


def is_texts(value: Any) -> bool:
    """Whether a value is an object of texts."""
    return isinstance(value, dict) and all(map(is_text, value.values()))
