"""A few of the kills of benches/kills.py for every writer of the package."""

from __future__ import annotations

from pathlib import Path

import kills
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kills.Writer]:
    return kills.writers(tmp_path_factory.mktemp("scratch"))


NAMES = [
    "save_adapter",
    'save_adapter, residual="weight"',
    "export_lora",
    "save_model",
    "CovarianceSet.save",
    "covariances block by block",
    "write_json",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_kill_leaves_the_old_result_or_the_new_one(
    writers: dict[str, kills.Writer], tmp_path: Path, name: str
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = kills.examine(writers[name], tmp_path, 6)
    finally:
        torch.set_num_threads(threads)
    assert min(found.values()) > 0


def test_all_writers_are_killed(writers: dict[str, kills.Writer]) -> None:
    assert list(writers) == NAMES
