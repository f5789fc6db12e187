"""Progress: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import pytest

from corda_kernels import progress
from corda_kernels.progress import progress_bar


@pytest.mark.parametrize(("total", "line"), [(4, "working: 75% of 4, "), (None, "working: 3, ")])
def test_a_log_gets_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    total: int | None,
    line: str,
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0)
    with progress_bar(description="working", unit="steps", total=total) as bar:
        for _ in range(3):
            bar.update()
        found = capsys.readouterr().err.splitlines()
    assert any(part.startswith(line) for part in "\n".join(found).replace("\r", "").split("\n"))


def test_short_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress_bar(range(3), description="working", unit="steps"):
        pass
    assert capsys.readouterr().err == ""


def test_what_is_not_shown_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0)
    for _ in progress_bar(range(3), description="working", unit="steps", shown=False):
        pass
    assert capsys.readouterr().err == ""
