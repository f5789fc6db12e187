"""docs/design/architecture.md names files and names that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("corda_kernels", "tests", "benches", "csrc", "docs")
QUOTED = set(
    re.findall(r"`([^`\n]+)`", (ROOT / "docs/design/architecture.md").read_text(encoding="utf-8"))
)
ENDINGS = (".py", ".j2", ".md", ".toml", ".in", ".txt", ".sh", ".cuh", ".cu")


def test_every_file_is_there() -> None:
    named = {name for name in QUOTED if re.fullmatch(r"[\w./*-]+", name)}
    paths = {name for name in named if "/" in name or name.endswith(ENDINGS)}
    assert len(paths) > 100
    missing = {
        path
        for path in paths
        if not any(next(ROOT.glob(place), None) for place in (path, f"corda_kernels/{path}"))
        # A plain name may be that of a file in any folder.
        and ("/" in path or not any(next((ROOT / f).rglob(path), None) for f in FOLDERS))
    }
    assert missing == set()


def test_every_name_is_there() -> None:
    names = {name for name in QUOTED if re.fullmatch(r"[A-Za-z_][\w.]*\w", name)}
    parts = {part for name in names if not name.endswith(ENDINGS) for part in name.split(".")}
    assert len(parts) > 100
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    words = {word for file in files for word in re.findall(r"\w+", file.read_text("utf-8"))}
    words |= {file.stem for file in files} | {
        folder.name for file in files for folder in file.parents
    }
    assert parts - words == set()
