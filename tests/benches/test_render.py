from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cells
import matplotlib
import pytest
import render
import tables
from render import RenderError, Table, rendered

KNOWN = {
    "one": Table(lambda one: f"{one['value']:.1f}", ("first",)),
    "two": Table(lambda one, two: f"{one['value'] / two['value']:.2f}\n\nbelow", ("first", "next")),
}
DOCUMENT = """before
<!-- table: one -->
old
<!-- end -->
between
<!-- table: two -->
<!-- end -->
after
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "first.json").write_text('{"value": 3}')
    (tmp_path / "next.json").write_text('{"value": 2}')
    return tmp_path


def test_the_documents_show_what_the_committed_results_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = (render.ROOT / "docs/figures/gpu-covariance.svg").read_bytes()
    if b"Matplotlib v%s," % matplotlib.__version__.encode() not in figure:
        # Another version draws the same otherwise.
        monkeypatch.setattr("kernel_figure.draw", lambda _: figure)
    assert render.main(["--check"]) == 0, capsys.readouterr()


def test_every_table_is_shown_somewhere_in_the_documents() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in render.documents())
    shown = set(re.findall(r"^<!-- table: ([\w-]+) -->", text, re.MULTILINE))
    # No GPU has run these.
    later = {"gpu-svd-methods", "gpu-pipeline"}
    assert shown | later == render.TABLES.keys()


def test_the_readme_has_no_measurement_outside_of_its_tables() -> None:
    text = (render.ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|<!-- table.*?<!-- end -->|`[^`]*`", "", text, flags=re.DOTALL)
    typed = re.findall(r"\d[\d.,]* ?(?:s|ms|MiB|GiB|times|×)(?!\w)|\d+(?:\.\d+)?e-\d+", prose)
    assert typed == []


def test_tables_are_made_between_their_markers_only(results: Path) -> None:
    text, changed = rendered(DOCUMENT, results, KNOWN)
    assert changed == ["one", "two"]
    assert text == (
        "before\n<!-- table: one -->\n3.0\n<!-- end -->\nbetween\n"
        "<!-- table: two -->\n1.50\n\nbelow\n<!-- end -->\nafter\n"
    )
    assert rendered(text, results, KNOWN) == (text, [])
    spoken_of = "a pair of `<!-- table: one -->` and `<!-- end -->`\n"
    assert rendered(spoken_of, results, KNOWN) == (spoken_of, [])


def test_a_figure_that_was_changed_by_hand_is_noticed_and_put_right(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render, "RESULTS", results)
    monkeypatch.setattr(render, "TABLES", KNOWN)
    page = results / "page.md"
    page.write_text(rendered(DOCUMENT, results, KNOWN)[0].replace("3.0", "9.0"))
    assert render.main(["--check"], [page]) == 1
    assert "table one differs" in capsys.readouterr().out
    assert "9.0" in page.read_text()
    assert render.main([], [page]) == 0
    assert "3.0" in page.read_text()
    assert render.main(["--check"], [page]) == 0


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- table: three -->\n<!-- end -->\n", "no table 'three'"),
        ("<!-- table: one -->\n", "<!-- table: one --> is half of a pair"),
        ("text <!-- table: one -->\n<!-- end -->\n", "half of a pair"),
        ("<!-- end -->\n", "<!-- end --> is half of a pair"),
        ("<!-- table: one -->\n<!-- table: two -->\n<!-- end -->\n", "half of a pair"),
    ],
)
def test_markers_that_cannot_be_used_are_told(results: Path, document: str, message: str) -> None:
    with pytest.raises(RenderError, match=message):
        rendered(document, results, KNOWN)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"next\.json, which cannot be read"), ("{", "cannot be read"), ("{}", "lacks 'value'")],
)
def test_results_that_cannot_be_used_are_told(
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    (results / "next.json").unlink()
    if content is not None:
        (results / "next.json").write_text(content)
    page = results / "page.md"
    page.write_text(DOCUMENT)
    monkeypatch.setattr(render, "RESULTS", results)
    monkeypatch.setattr(render, "TABLES", KNOWN)
    assert render.main([], [page]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert page.read_text() == DOCUMENT


def committed(name: str) -> dict[str, Any]:
    return json.loads((render.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_what_is_wrong_has_no_speed() -> None:
    svd, pipeline = committed("cpu-svd"), committed("cpu-pipeline")
    svd["rows"][2] |= {"passed": False, "timing": None, "speedup": None, "error": 0.5}
    pipeline["pipeline"][1] |= {"passed": False, "overlap": 0.2}
    (line,) = (row for row in tables.decompositions(svd).splitlines() if "5.0e-01" in row)
    assert line == "| SmolLM2-135M, r = 32 | IPM | corda_kernels | – | – | 5.0e-01, wrong |"
    (line,) = (row for row in tables.pipelines(pipeline).splitlines() if "| patch_peft" in row)
    assert line.startswith("| patch_peft | computes something else: no speed | – |")
    shown = tables.covariances(committed("gpu-covariance")).splitlines()
    (line,) = (row for row in shown if "1536 bfloat16" in row)
    assert "| – | 5.3e-05, wrong |" in line
    assert line.endswith("| – |")


def test_all_rows_of_a_table_have_its_columns() -> None:
    for table in render.TABLES.values():
        if not all((render.RESULTS / f"{name}.json").exists() for name in table.results):
            continue
        text = table.make(*map(committed, table.results))
        parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
        assert parts
        for rows in parts:
            assert len({row.count("|") for row in rows if row.startswith("|")}) == 1


def test_stages_are_shown() -> None:
    pipeline = committed("cpu-pipeline")
    stages = {"forward": 3.25, "decomposition": 2.5, "attaching": 0.75}
    pipeline["pipeline"].append(
        {"name": "eva", "seconds": 6.5, "forward": 3.25, "growth": 7 << 20, "stages": stages}
        | {"overlap": None, "passed": True, "beyond": 4.0}
    )
    peft = pipeline["pipeline"][0]
    (line,) = (row for row in tables.pipelines(pipeline).splitlines() if "EVA" in row)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["PEFT EVA", "6.5", "3.2", "–", "2.5", "0.8"]
    assert cells[6:8] == [f"{peft['seconds'] / 6.5:.2f}", f"{peft['beyond'] / 4:.2f}"]
    assert cells[8] == "7 MiB"


@pytest.mark.parametrize(("worst", "shown"), [(0.125, "1.2e-01"), (None, "inf")])
def test_the_worst_of_all_layers_counts(worst: float | None, shown: str) -> None:
    accuracy = committed("cpu-decomposition-accuracy")
    accuracy["runs"][0]["top"] = worst  # of which JSON holds nothing if it is not finite
    read = [committed(f"cpu-{name}") for name in ("covariance", "svd")]
    text = tables.speed(*read, accuracy, committed("cpu-pipeline"))
    (line,) = (row for row in text.splitlines() if "IPM: decomposition" in row)
    assert line.count(f"| {shown} |") == 1
    assert ("not finite" in tables.accuracies(accuracy)) == (worst is None)


def test_a_random_model_is_shown_part_by_part() -> None:
    text = tables.end_to_end(
        {
            "environment": committed("cpu-svd")["environment"],
            "parts": {"forward": {"seconds": 1.25, "growth": 3 << 20}},
            "layers": 32,
            "hidden": 4096,
            "dtype": "bfloat16",
            "weight_bytes": 12852 << 20,
            "tokens": 32768,
            "mode": "ipm",
            "rank": 128,
            "covariance_bytes": 22 << 30,
            "way": "one pass",
        }
    )
    assert "| forward | 1.2 s | 3 MiB |" in text
    assert "12,852 MiB of random weights" in text
    assert "22,528 MiB, one pass." in " ".join(text.split())


def test_a_second_machine_is_named_too() -> None:
    one, other = committed("cpu-svd"), committed("cpu-svd")
    other["environment"] |= {"device": "A card", "threads": 16}
    assert cells.measured_on(one, one).count("Measured") == 1
    both = cells.measured_on(one, other)
    assert both.count("Measured") == 2
    assert "A card, 16 threads" in both


def test_the_folder_of_a_model_is_not_told() -> None:
    assert cells.model_name("/home/someone/SmolLM2-135M/") == "SmolLM2-135M"
    assert cells.model_name("org/model") == "model"
    assert cells.model_name("model") == "model"
