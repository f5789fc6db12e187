"""Checks of arguments that several modules share: numbers, choices, names, tensors, paths, devices.

None reads the entries of a tensor that is more than one number, so that none waits for a GPU.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from corda_kernels.errors import ConfigError, CordaError

_SHOWN = 80  # characters of a value in a message
# What torch.Generator takes.
_SEEDS = (-(2**63), 2**64 - 1)


def shown(value: object) -> str:
    """The value as a message shows it: as it is written if that is short, else by its type."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = ""
    if 0 < len(text) <= _SHOWN and "\n" not in text:
        return text
    return f"a value of type {type(value).__name__}"


def instance_of(
    name: str,
    value: object,
    kind: type | tuple[type, ...],
    error: type[CordaError] = ConfigError,
    *,
    remedy: str = "",
) -> None:
    """Refuses a value of another type.

    Raises:
        CordaError: of type `error`; `name` is what the value is called, as in all that follows.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else f"a {k.__name__}" for k in kinds)
        raise error(f"{name} must be {wanted}, got {shown(value)}{f': {remedy}' if remedy else ''}")


def one_of(
    name: str,
    value: object,
    allowed: Sequence[str | None],
    error: type[CordaError] = ConfigError,
) -> None:
    """Refuses a value that is none of those allowed.

    Raises:
        CordaError: of type `error`.
    """
    if not isinstance(value, str | None) or value not in allowed:
        *others, last = ("None" if each is None else f'"{each}"' for each in allowed)
        raise error(f"{name} must be {', '.join(others)} or {last}, got {shown(value)}")


def whole_number(
    name: str,
    value: object,
    least: int | None = None,
    most: int | None = None,
    *,
    error: type[CordaError] = ConfigError,
) -> int:
    """The value, of Python, NumPy or torch, as an int.

    Raises:
        CordaError: of type `error`: it is no whole number, or below `least` or above `most`.
    """
    number = None
    if not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except (TypeError, RuntimeError):  # torch has a RuntimeError for tensors without a value
            number = None
    if (
        number is None
        or (least is not None and number < least)
        or (most is not None and number > most)
    ):
        bounds = "" if least is None else f" of at least {least}"
        if most is not None:
            bounds = f" from {least} to {most}"
        raise error(f"{name} must be a whole number{bounds}, got {shown(value)}")
    return number


def seed_number(name: str, value: object) -> int:
    """The value as a seed of a random generator.

    Raises:
        ConfigError: it is no whole number of 64 bits.
    """
    number = whole_number(name, value)
    if not _SEEDS[0] <= number <= _SEEDS[1]:
        raise ConfigError(f"{name} must be within 64 bits, got {shown(number)}")
    return number


def real_number(
    name: str,
    value: object,
    rule: str,
    holds: Callable[[float], bool],
    *,
    error: type[CordaError] = ConfigError,
) -> float:
    """The value, of Python, NumPy or torch, as a float.

    Args:
        name: what it is called.
        value: to be checked.
        rule: what must hold, in words that follow "must be".
        holds: the same as a function, which NaN must not satisfy.
        error: type to raise.

    Raises:
        CordaError: of type `error`: it is no real number, or the rule does not hold.
    """
    number = math.nan
    scalar = isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
    if (scalar or isinstance(value, numbers.Real)) and not isinstance(value, bool):
        try:
            number = float(value)  # type: ignore[arg-type]
        except (OverflowError, RuntimeError):  # beyond float64, or on the meta device
            number = math.nan
    if not holds(number):
        raise error(f"{name} must be {rule}, got {shown(value)}")
    return number


def flag(name: str, value: object) -> None:
    """Refuses what is neither True nor False, such as "no", which Python takes for true.

    Raises:
        ConfigError: it is.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {shown(value)}")


def name_list(name: str, value: object, error: type[CordaError] = ConfigError) -> None:
    """Refuses what is no list, tuple or set of names.

    Raises:
        CordaError: of type `error`.
    """
    if (
        isinstance(value, str)
        or not isinstance(value, Collection)
        or not all(isinstance(each, str) for each in value)
    ):
        raise error(f"{name} must be a list of names, got {shown(value)}")


def holds_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is dense and its entries are there to read."""
    return tensor.layout == torch.strided and not tensor.is_meta


def real_tensor(name: str, value: object, error: type[CordaError]) -> None:
    """Refuses what is no dense tensor of floating numbers.

    Raises:
        CordaError: of type `error`: it is no tensor; or of whole, complex or 8-bit numbers; or
            sparse, or without entries (on the meta device).
    """
    if not isinstance(value, Tensor):
        raise error(
            f"{name} must be a tensor, got a value of type {type(value).__name__}: torch.as_tensor "
            "makes one of an array or a list"
        )
    # Numbers of eight bits mean nothing without the scales that are kept beside them.
    if not value.is_floating_point() or value.itemsize < 2:
        remedy = "which part of it is meant?" if value.is_complex() else "convert it by .float()"
        raise error(f"{name} must hold real floating numbers, got {value.dtype}: {remedy}")
    if not holds_numbers(value):
        where = "the meta device" if value.is_meta else f"layout {value.layout}"
        raise error(f"{name} must be a dense tensor with its numbers at hand, got one on {where}")


def readable_path(value: object, error: type[CordaError]) -> Path:
    """The path of something to read, which may not be there.

    Raises:
        CordaError: of type `error`: it is no path, or none that the system can look up.
    """
    try:
        path = Path(value)  # type: ignore[arg-type]
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except TypeError as reason:
        raise error(f"a path must be a text or a pathlib.Path, got {shown(value)}") from reason
    except (OSError, ValueError) as reason:  # too long, no permission; a NUL character
        cause = reason.strerror if isinstance(reason, OSError) else str(reason)
        raise error(f"{shown(value)} cannot be read: {cause}; check the path") from reason
    return path


def usable_device(value: object, error: type[CordaError]) -> torch.device:
    """The device of that name, if it is one of a kind that holds numbers.

    Raises:
        CordaError: of type `error`.
    """
    try:
        device: torch.device = torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as reason:
        raise error(f"there is no device {shown(value)}: choose cpu or cuda") from reason
    if device.type == "meta":
        raise error("device meta holds no numbers: choose cpu or cuda")
    return device
