"""Checks of arguments that several modules share: numbers, choices, names, tensors, paths, devices.

Each refuses a value by an error of type `error` that begins with `name`, what the value is called.
None reads the entries of a tensor that is more than one number, so that none waits for a GPU.
"""

from __future__ import annotations

import contextlib
import numbers
import operator
import os
from collections.abc import Callable, Collection, Sequence
from math import inf, nan
from pathlib import Path

import torch
from torch import Tensor

from corda_kernels.errors import ConfigError, CordaError

Error = type[CordaError]
Kind = type | tuple[type, ...]

_SHOWN = 80  # characters of a value in a message


def shown(value: object) -> str:
    """The value as a message shows it: as it is written if that is short, else by its type."""
    text = ""
    with contextlib.suppress(ValueError):  # a whole number of more digits than Python writes
        text = repr(value)
    if 0 < len(text) <= _SHOWN and "\n" not in text:
        return text
    return f"a value of type {type(value).__name__}"


def instance_of(
    name: str, value: object, kind: Kind, error: Error = ConfigError, remedy: str = ""
) -> None:
    """Refuses a value of another type.

    Raises:
        CordaError: of type `error`.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else f"a {k.__name__}" for k in kinds)
        raise error(f"{name} must be {wanted}, got {shown(value)}{remedy and f': {remedy}'}")


def one_of(
    name: str, value: object, allowed: Sequence[str | None], error: Error = ConfigError
) -> None:
    """Refuses a value that is none of those allowed.

    Raises:
        CordaError: of type `error`.
    """
    if not isinstance(value, str | None) or value not in allowed:
        *others, last = ("None" if each is None else f'"{each}"' for each in allowed)
        raise error(f"{name} must be {', '.join(others)} or {last}, got {shown(value)}")


def whole_number(
    name: str, value: object, least: float = -inf, most: float = inf, error: Error = ConfigError
) -> int:
    """The value, of Python, NumPy or torch, as an int.

    Raises:
        CordaError: of type `error`: it is no whole number, or below `least` or above `most`.
    """
    number = None
    # A tensor without a value has a RuntimeError.
    with contextlib.suppress(TypeError, RuntimeError):
        number = operator.index(value)  # type: ignore[arg-type]
    if number is None or isinstance(value, bool) or not least <= number <= most:
        bounds = "" if least == -inf else f" of at least {least}"
        if most != inf:
            bounds = f" from {least} to {most}"
        raise error(f"{name} must be a whole number{bounds}, got {shown(value)}")
    return number


def seed_number(name: str, value: object) -> int:
    """The value as a seed of a random generator, of the 64 bits that torch takes.

    Raises:
        ConfigError: it is none.
    """
    return whole_number(name, value, -(2**63), 2**64 - 1)


def real_number(
    name: str, value: object, rule: str, holds: Callable[[float], bool], error: Error = ConfigError
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
    number = nan
    scalar = isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
    if (scalar or isinstance(value, numbers.Real)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError, RuntimeError):  # beyond float64; a meta tensor
            number = float(value)  # type: ignore[arg-type]
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


def name_list(name: str, value: object, error: Error = ConfigError) -> None:
    """Refuses what is no list, tuple or set of names.

    Raises:
        CordaError: of type `error`.
    """
    named = isinstance(value, Collection) and all(isinstance(each, str) for each in value)
    if isinstance(value, str) or not named:
        raise error(f"{name} must be a list of names, got {shown(value)}")


def holds_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is dense and its entries are there to read."""
    return tensor.layout == torch.strided and not tensor.is_meta


def real_tensor(name: str, value: object, error: Error) -> None:
    """Refuses what is no dense tensor of floating numbers.

    Raises:
        CordaError: of type `error`: it is no tensor; or of whole, complex or 8-bit numbers; or
            sparse, or without entries (on the meta device).
    """
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise error(f"{name} must be a tensor, got a value of type {kind}: see torch.as_tensor")
    # Numbers of eight bits mean nothing without the scales that are kept beside them.
    if not value.is_floating_point() or value.itemsize < 2:
        raise error(f"{name} must have a floating dtype, got {value.dtype}: convert it")
    if not holds_numbers(value):
        found = f"{value.layout} on {value.device}"
        raise error(f"{name} must be a dense tensor that holds its values, got {found}")


def readable_path(value: object, error: Error) -> Path:
    """The path of something to read, which may not be there.

    Raises:
        CordaError: of type `error`: it is no path, or none that the system can look up.
    """
    try:
        path = Path(value)  # type: ignore[arg-type]
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    except TypeError as reason:
        raise error(f"a path must be a text or a pathlib.Path, got {shown(value)}") from reason
    except (OSError, ValueError) as reason:  # too long, no permission; a NUL character
        cause = reason.strerror if isinstance(reason, OSError) else str(reason)
        raise error(f"{shown(value)} cannot be read: {cause}; check the path") from reason
    return path


def usable_device(value: object, error: Error) -> torch.device:
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
