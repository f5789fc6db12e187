"""The one way in which long work shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 30


def progress_bar(
    work: Iterable[Any] | None = None,
    *,
    description: str,
    unit: str,
    shown: bool = True,
    total: int | None = None,
    scaled: bool = False,
) -> tqdm[Any]:
    """A bar on stderr with rate and time left; in a log, a line of it now and then.

    Args:
        work: what to iterate over, or None to call `update` by hand.
        description: what is being done.
        unit: of the count.
        shown: False for none at all.
        total: the count at the end, where `work` does not tell.
        scaled: whether to abbreviate large counts, 1.2k.
    """
    in_log: dict[str, Any] = {
        "delay": _LOG_SECONDS,
        "mininterval": _LOG_SECONDS,
        "maxinterval": _LOG_SECONDS,
        "bar_format": "{desc}: {percentage:.0f}% of {total_fmt}, {rate_fmt}, {remaining} left\n"
        if total is not None or isinstance(work, Sized)
        else "{desc}: {n_fmt}, {rate_fmt}\n",
    }
    return tqdm(
        work,
        desc=description,
        unit=f" {unit}",
        total=total,
        unit_scale=scaled,
        disable=not shown,
        leave=False,
        **({} if sys.stderr.isatty() else in_log),
    )
