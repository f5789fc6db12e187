"""Pages in a real browser, at the width of a desktop and of a phone."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
WIDTHS = (1280, 390)

# A window is never as narrow as a phone, so that each page gets a frame of the width.
MEASURE = """
window.onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const box = e => e.getBoundingClientRect();
    const said = e => e.tagName + ": " + (e.textContent || "").trim().slice(0, 60);
    const wide = [], cut = [], small = [], over = [];
    for (const e of page.body.querySelectorAll("*"))
      if (!e.closest(".scroll *") && !e.closest("svg *") && box(e).right > root.clientWidth + .5)
        wide.push(said(e));
    const figures = [...page.querySelectorAll("figure")];
    for (const figure of figures) {
      const svg = figure.querySelector("svg"), frame = box(svg);
      for (const t of svg.querySelectorAll("text")) {
        const b = box(t);
        if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1
            || b.bottom > frame.bottom + 1) cut.push(figure.textContent.slice(0, 30) + said(t));
        const scale = frame.width / svg.viewBox.baseVal.width;
        if (parseFloat(getComputedStyle(t).fontSize) * scale < 8.5) small.push(said(t));
      }
      for (const other of figures) {
        const a = box(figure), b = box(other);
        if (other !== figure && a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 1 && b.top < a.bottom - 1) over.push(said(figure));
      }
    }
    const scroll = page.querySelector(".scroll");
    found[frame.width] = {page: root.scrollWidth, client: root.clientWidth, figures: figures.length,
      wide, cut, small, over, table: [scroll.clientWidth, scroll.scrollWidth],
      columns: new Set(figures.map(f => Math.round(box(f).left))).size};
  }
  document.body.textContent = "FOUND" + encodeURIComponent(JSON.stringify(found)) + "END";
};
"""


def browser() -> str:
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium to open the page in: install the package chromium")


def test_nothing_overflows_or_is_cut_at_any_width(large_page: str, tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(large_page)}"></iframe>'
        for width in WIDTHS
    )
    file = tmp_path / "frames.html"
    file.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>{MEASURE}</script>',
        encoding="utf-8",
    )
    ran = subprocess.run(
        [browser(), *FLAGS, f"--user-data-dir={tmp_path}/profile", "--dump-dom", file.as_uri()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=240,
        check=True,
        text=True,
    )
    found = json.loads(unquote(ran.stdout.partition("FOUND")[2].partition("END")[0]))
    for width in WIDTHS:
        seen = found[str(width)]
        assert seen["page"] <= seen["client"] <= width
        assert seen["figures"] > 30
        for fault in ("wide", "cut", "small", "over"):
            assert seen[fault] == [], (width, fault)
    phone, desktop = found["390"], found["1280"]
    assert (phone["columns"], desktop["columns"]) == (1, 3)
    # The table scrolls inside its own box.
    assert phone["table"][0] < 390 < phone["table"][1]
