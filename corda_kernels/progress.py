"""The one way in which long work shows how far it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    work: Iterable[Any] | None = None,
    *,
    description: str,
    unit: str,
    shown: bool = True,
    total: int | None = None,
    scaled: bool = False,
) -> tqdm[Any]:
    """A bar on stderr with rate and time left; none where stderr is no terminal, such as a log.

    Args:
        work: what to iterate over, or None to call `update` by hand.
        description: what is being done.
        unit: of the count.
        shown: False for none at all.
        total: the count at the end, where `work` does not tell.
        scaled: whether to abbreviate large counts, 1.2k.
    """
    return tqdm(
        work,
        desc=description,
        unit=f" {unit}",
        total=total,
        unit_scale=scaled,
        disable=None if shown else True,
        leave=False,
    )
