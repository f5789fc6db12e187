"""`corda-kernels inspect --html`."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corda_kernels.cli import app
from corda_kernels.errors import ConfigError, CordaError, MissingExtraError, OutputError

pytestmark = pytest.mark.usefixtures("no_charts")


@pytest.fixture
def inspect() -> Callable[..., str]:
    """Runs the command; returns what it printed, or raises its error."""

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return run


@pytest.mark.slow
def test_an_adapter_with_its_covariances_and_model_shows_everything(
    inspect: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    more = ("--cov", run / "covariances.safetensors", "--model", run / "model")
    shown = inspect(run / "ipm", "--html", page, *more)
    assert shown.startswith(inspect(run / "ipm"))
    assert shown.endswith(f"{page}: the same with figures\n")
    text = page.read_text(encoding="utf-8")
    assert "Input of self_attn.q_proj" in text
    assert "C, the inputs" in text
    assert "W·C, the layers" in text
    assert "is recorded" not in text


def test_a_covariance_file_has_a_page_too(
    inspect: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    file, page = run / "covariances.safetensors", tmp_path / "page.html"
    assert inspect(file, "--html", page).startswith(inspect(file))
    text = page.read_text(encoding="utf-8")
    assert "<h1>covariances.safetensors</h1>" in text
    assert "No spectrum of W·C is recorded here" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ipm", "--cov", "c"), "give --html PAGE"),
        (("ipm", "--model", "m"), "give --html PAGE"),
        (("ipm", "--model", "m", "--html", "p"), "give --cov as well"),
        (("covariances.safetensors", "--cov", "c", "--html", "p"), "is no adapter folder"),
    ],
)
def test_options_that_lack_their_companion_are_refused(
    inspect: Callable[..., str], run: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        inspect(run / arguments[0], *arguments[1:])


def test_what_cannot_be_written_or_drawn_is_told_before_the_work(
    inspect: Callable[..., str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="is a folder already"):
        inspect(run / "missing", "--html", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        inspect(run / "missing", "--html", tmp_path / "page.html")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("inputs", 3),
        ("inputs", [{"layers": []}]),
        ("layers", [1]),
        ("seconds", {"calibration": "long"}),
        ("seconds", {"calibration": float("nan")}),
        ("peak_bytes", {"process": -1}),
        ("spectrum", {"total": 3, "index": [0, 7], "value": [1, 0]}),
        ("spectrum", {"total": 3, "index": [1, 0], "value": [1, 0]}),
        ("spectrum", {"total": 3, "index": [0], "value": [float("inf")]}),
        ("spectrum", None),
        ("shape", [1]),
    ],
)
def test_an_altered_note_on_the_run_is_told(
    inspect: Callable[..., str], run: Path, tmp_path: Path, part: str, value: Any
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(run / "ipm", folder)
    file = folder / "corda.json"
    record = json.loads(file.read_text())
    first = next(iter(record["measured"]["layers"].values()))
    (first if part in first else record["measured"])[part] = value
    file.write_text(json.dumps(record))
    inspect(folder)  # the table has no use for it
    page = tmp_path / "page.html"
    if value is None:
        inspect(folder, "--html", page)
        return
    with pytest.raises(CordaError, match="the note on the run was altered"):
        inspect(folder, "--html", page)
    assert not page.exists()
