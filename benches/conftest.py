"""What the suites share: sizes that shrink with --tiny, and how a call is timed and checked.

    python -m pytest benches -n 0 --benchmark-json=out.json

Every group holds one task; its first contestant is the honest baseline. `extra_info["error"]` is
how far the result is from float64, in the terms that the suite names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_TINY = 16

Result = TypeVar("Result")
Sized = Callable[[int], int]
# The group, the call that is timed, and the error of what it returns.
Contest = Callable[[str, Callable[[], Result], Callable[[Result], float]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny", action="store_true", help=f"divide all sizes by {_TINY}: to see that it runs"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A few rounds are enough where a call takes a second, and all of them are to take minutes."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(min_rounds=3, max_time=0.5))


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def sized(pytestconfig: pytest.Config) -> Sized:
    """Sizes as they are given, or smaller."""
    tiny = pytestconfig.getoption("--tiny")
    return lambda size: max(2, size // _TINY) if tiny else size


@pytest.fixture
def contest(benchmark: Any) -> Contest[Any]:
    """Times one contestant of a group, and notes the error of its result."""

    def run(group: str, call: Callable[[], Result], error: Callable[[Result], float]) -> None:
        def finished() -> Result:
            result = call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)
            return result

        benchmark.group = group
        benchmark.extra_info["error"] = error(benchmark(finished))

    return run
