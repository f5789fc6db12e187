"""A mode, or an end of the spectrum, that is forgotten in one of the places that list all."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from corda_kernels import CordaConfig, allocate_ranks
from corda_kernels.adapter.factors import MODES
from corda_kernels.cli.init import init
from corda_kernels.linalg import End
from corda_kernels.planning.stability import _BOUNDS, _JUDGES, AGREEMENT, LayerStability
from corda_kernels.report.table import _MEANINGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md", "docs/which-mode.md", "docs/guide/first-adapter.md")


def options_of(function: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(function)["mode"])


def test_options_and_their_help_name_every_mode() -> None:
    assert options_of(CordaConfig) == options_of(init) == tuple(MODES)
    (option,) = get_type_hints(init, include_extras=True)["mode"].__metadata__
    for told in (option.help, inspect.getdoc(init), inspect.getdoc(CordaConfig)):
        assert [mode for mode in MODES if not re.search(rf"\b{mode}\b", told)] == []
    # A budget is shared out by the spectrum of W·C.
    assert set(options_of(allocate_ranks)) == MODES.keys() - {"task"}


@pytest.mark.parametrize("page", PAGES)
def test_pages_on_the_choice_of_a_mode_name_every_one(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").lower()
    assert [mode for mode in MODES if not re.search(rf"\b{mode}\b", text)] == []


def test_the_stability_of_every_end_is_judged_and_shown() -> None:
    ends = get_args(End)
    assert {mode.end for mode in MODES.values()} <= set(ends)
    assert tuple(AGREEMENT) == tuple(_JUDGES) == ends
    shares = [field.name for field in dataclasses.fields(LayerStability)]
    assert list(AGREEMENT.values()) == list(_BOUNDS) == shares
    assert set(shares) <= _MEANINGS.keys()
