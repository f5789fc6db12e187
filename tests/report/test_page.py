"""The page's structure, as an HTML parser sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from typing import Any

import pytest

from corda_kernels.errors import MissingExtraError
from corda_kernels.report import page
from corda_kernels.report.content import Layer, Report
from corda_kernels.report.figures import power_of_ten
from corda_kernels.report.page import html_page, write_page

VOID = {"meta", "img", "br", "link", "input", "hr", "use", "path", "rect", "image", "stop"}
SECTIONS = {
    "Ranks",
    "Spectra of W·C",
    "Spectra of C",
    "Conditions",
    "Outlier channels",
    "Selection",
    "Stability",
    "Time and memory",
}


@dataclass
class Node:
    """An element with its attributes, and the text and elements inside."""

    tag: str
    attributes: dict[str, str]
    inside: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(n if isinstance(n, str) else n.text for n in self.inside)

    def all(self, tag: str | None = None, kind: str | None = None) -> Iterator[Node]:
        for node in self.inside:
            if isinstance(node, Node):
                if tag in (None, node.tag) and kind in (None, node.attributes.get("class")):
                    yield node
                yield from node.all(tag, kind)


class Tree(HTMLParser):
    """Parses a page; every element must be closed in its place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open = [Node("", {})]
        self.feed(page)
        assert len(self.open) == 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(node)
        if tag not in VOID or self.get_starttag_text() is None:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parsed(page: str) -> Node:
    return Tree(page).open[0]


def sections(page: str) -> dict[str, Node]:
    return {next(s.all("h2")).text: s for s in parsed(page).all("section")}


def check(page: str) -> None:
    """What holds for every page."""
    root = parsed(page)
    tags = {node.tag for node in root.all()}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "img", "base"})
    assert "http" not in page
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=\s]*", "", page)
    assert "@import" not in page
    for node in root.all():
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), value
    names = [node.attributes["id"] for node in root.all() if "id" in node.attributes]
    assert len(names) == len(set(names))
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', page)
    assert set(used) <= set(names)
    assert next(root.all("html")).attributes["lang"] == "en"
    assert next(root.all("title")).text
    assert len(list(root.all("h1"))) == 1
    for figure in root.all("figure"):
        (caption,) = figure.all("figcaption")
        (svg,) = figure.all("svg")
        assert caption.text.strip()
        assert svg.attributes["role"] == "img"
        assert svg.attributes["aria-label"].startswith(caption.text)
        for axis in ("x-unit", "y-unit"):
            (unit,) = svg.all("g", axis)
            assert re.search(r"\w.* \(.+\)$", unit.text.strip()), unit.text
    for table in root.all("table"):
        heads = [node for node in table.all("th") if node.attributes["scope"] == "col"]
        rows = list(next(table.all("tbody")).all("tr"))
        assert rows
        for row in rows:
            cells = [node for node in row.all() if node.tag in ("th", "td")]
            assert [cells[0].tag, cells[0].attributes["scope"]] == ["th", "row"]
            assert len(cells) == len(heads)


FIGURES = {
    # Ranks, spectra of W·C, of C, conditions, outliers, selection, stability, time and memory.
    "ipm": (0, 7, 0, 0, 4, 0, 2, 2),
    "kpm": (7, 7, 0, 2, 4, 5, 0, 2),
    "pool": (0, 7, 0, 0, 4, 5, 0, 2),
    "old": (0, 0, 0, 0, 0, 0, 0, 1),
    "covariances": (None, 7, 4, 2, 4, 0, 3, 1),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "old")) for name in FIGURES]
)
def test_a_page_shows_what_is_known_and_says_what_is_not(
    reports: dict[str, Report], page_of: Callable[[str], str], name: str
) -> None:
    report, text = reports[name], page_of(name)
    check(text)
    found = sections(text)
    assert found.keys() >= SECTIONS - ({"Ranks"} if name == "covariances" else set())
    order = ["Ranks", "Spectra of W·C", "Spectra of C", "Conditions", "Outlier channels"]
    order += ["Selection", "Stability", "Time and memory"]
    for title, count in zip(order, FIGURES[name], strict=True):
        if count is None:
            assert title not in found
            continue
        assert len(list(found[title].all("figure"))) == count, title
        assert len(next(found[title].all("p")).text) > 20
    summary = found["Summary"].text
    assert report.title in summary
    for label, line in report.summary:
        assert label + line in summary
    rows = [row.text for row in next(found["Layers"].all("tbody")).all("tr")]
    assert len(rows) == len(report.layers) == 14


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ipm", "pool", "covariances"])
def test_ticks_of_shares_are_round(page_of: Callable[[str], str], name: str) -> None:
    shown = sections(page_of(name))["Spectra of W·C"]
    ticks = [text for node in shown.all("text") if (text := node.text.strip()).endswith("%")]
    assert len(set(ticks)) > 2
    for tick in ticks:
        value = float(tick.rstrip("%"))
        assert any(x == pytest.approx(float(f"{x:.1g}")) for x in (value, 100 - value)), tick


def test_the_summary_tells_mode_rank_tokens_parameters_and_verdicts(
    reports: dict[str, Report],
) -> None:
    ipm, kpm = (dict(reports[name].summary) for name in ("ipm", "kpm"))
    assert reports["ipm"].title.startswith("IPM adapter of rank 4 for 14 layers of")
    assert ipm["trains"] == "the largest components of W·C"
    assert ipm["calibration tokens"] == "480"
    assert ipm["largest rank of the LoRA"] == "8"
    assert ipm["data"].startswith("not recorded")
    assert "tokens" not in ipm
    assert ipm["trainable parameters"] == f"{reports['ipm'].trainable:,}"
    assert "layers stable" in ipm["samples"]
    spent = f"{reports['kpm'].allocation['spent']:,} of {reports['kpm'].allocation['budget']:,}"
    assert f"{spent} parameters" in reports["kpm"].title
    assert kpm["trains"] == "the smallest components of W·C"
    assert kpm["selection"].startswith("3 candidates")
    assert kpm["samples"] == "their stability was not measured"


def test_the_uniform_rank_costs_what_was_spent(reports: dict[str, Report]) -> None:
    report = reports["kpm"]
    shapes = [layer.shape for layer in report.layers.values()]
    rank = report.uniform_rank()
    assert rank is not None
    # A component has two rows in the LoRA.
    assert 2 * rank * sum(map(sum, shapes)) == pytest.approx(report.allocation["spent"])
    assert 2 < rank <= 3
    assert reports["old"].uniform_rank() == pytest.approx(4)
    assert reports["published"].uniform_rank() == pytest.approx(4)
    unknown = replace(report, layers=report.layers | {"x": Layer()})
    assert unknown.uniform_rank() is None


def test_the_form_of_an_adapter_decides_its_size(reports: dict[str, Report]) -> None:
    lora, published = reports["ipm"], reports["published"]
    assert lora.trainable == 2 * published.trainable
    # A LoRA is all that is kept; the published A and B have A0 and B0 beside them.
    assert lora.memory["adapter"] == 4 * lora.trainable
    assert published.memory["adapter"] == 2 * 4 * published.trainable
    assert lora.title.endswith("(hold 1, damping 0.01)")
    assert published.title.endswith("(residual weight, damping 0.01)")
    assert {layer.rank for layer in (*lora.layers.values(), *published.layers.values())} == {4}


def test_conditions_are_the_same_from_both_sources(reports: dict[str, Report]) -> None:
    found = reports["covariances"].conditions()
    assert found.keys() == reports["covariances"].layers.keys()
    assert reports["kpm"].conditions().keys() == found.keys()
    assert reports["ipm"].conditions() == {}


@pytest.mark.slow
def test_a_large_page_is_sound_and_small(large_page: str) -> None:
    check(large_page)
    assert len(large_page.encode()) < 2 << 20
    assert "<script" not in large_page
    assert "&lt;/script&gt;&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;" in large_page
    assert "&lt;img src=x" in large_page
    found = sections(large_page)
    # Of more than twelve kinds of layers the most frequent are drawn; the table has them all.
    assert len(list(found["Ranks"].all("figure"))) == 11
    assert len(list(next(found["Layers"].all("tbody")).all("tr"))) == 228
    assert "Left out" in found


def test_two_pages_of_one_report_are_the_same(
    reports: dict[str, Report], page_of: Callable[[str], str]
) -> None:
    assert html_page(reports["old"]) == page_of("old")


def test_without_matplotlib_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, reports: dict[str, Report], tmp_path: Any
) -> None:
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "corda_kernels\[report\]"'):
        write_page(reports["old"], tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "10⁻³"), (0.01, "0.01"), (1.0, "1"), (1000.0, "1000"), (1e10, "10¹⁰"), (2e4, "")],
)
def test_ticks_of_a_logarithmic_axis_are_powers_of_ten(value: float, text: str) -> None:
    assert power_of_ten(value) == text
