"""Writes the tables and figures of README.md and docs/ from benches/results/.

    python benches/render.py            # rewrites what stands between the markers
    python benches/render.py --check    # exit status 1 if that would change something

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, each on a line of its own. The
figure FOLDER/NAME.svg becomes docs/figures/FOLDER-NAME.svg: the site has no files from elsewhere.
docs/figures/gpu-covariance.svg is drawn here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import kernel_figure
import tables
from finetuning.starts import starts as starts_table
from finetuning.table import forms as forms_table
from finetuning.table import table as finetuning_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"

_MARKED = re.compile(
    r"^<!-- table: (?P<name>[\w-]+) -->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)
_MARKER = re.compile(r"(?<!`)<!-- (?:table: [^>]*|end) -->(?!`)")  # not one that is spoken of


@dataclass(frozen=True)
class Table:
    """How to make a table.

    Attributes:
        make: from the contents of result files, in order, to Markdown.
        results: their names, without the ending .json.
    """

    make: Callable[..., str]
    results: tuple[str, ...]


TABLES: dict[str, Table] = {
    "speed": Table(
        tables.speed,
        (
            *("cpu-covariance-avx2", "cpu-svd", "cpu-decomposition-accuracy"),
            *("cpu-pipeline", "cpu-pipeline-kpm"),
        ),
    ),
    "covariance": Table(tables.covariances, ("cpu-covariance", "cpu-covariance-4096")),
    "covariance-avx2": Table(tables.covariances, ("cpu-covariance-avx2",)),
    "svd": Table(tables.decompositions, ("cpu-svd", "cpu-svd-4096", "cpu-svd-11008")),
    "accuracy": Table(tables.accuracies, ("cpu-decomposition-accuracy",)),
    "reconstruction": Table(tables.reconstructions, ("cpu-reconstruction",)),
    "pipeline": Table(
        tables.pipelines,
        ("cpu-pipeline", "cpu-pipeline-kpm", "cpu-pipeline-pissa", "cpu-pipeline-eva"),
    ),
    "selection": Table(tables.selections, ("cpu-selection",)),
    "finetune": Table(finetuning_table, ("finetune-cpu/finetune",)),
    "forms": Table(forms_table, ("adapter-forms/finetune",)),
    "first-step": Table(tables.first_steps, ("cpu-adapter-first",)),
    "gradients": Table(tables.gradients, ("cpu-gradients",)),
    "divergence": Table(tables.divergences, ("cpu-divergence", "cpu-divergence-held-out")),
    "penalties": Table(tables.penalties, ("cpu-penalty",)),
    "adapter-cost": Table(tables.adapter_costs, ("cpu-adapter-cost",)),
    "gpu-speed": Table(tables.gpu_speed, ("gpu-covariance", "gpu-svd-llama2-7b")),
    "gpu-covariance": Table(tables.covariances, ("gpu-covariance",)),
    "gpu-svd": Table(tables.decompositions, ("gpu-svd-llama2-7b",)),
    "gpu-svd-batched": Table(tables.batched, ("gpu-svd-batched",)),
    "gpu-llama-shape": Table(tables.end_to_end, ("gpu-llama-shape",)),
    "starts": Table(starts_table, ("finetune-starts/finetune",)),
    # For when a GPU has run the rest of benches/gpu.sh.
    "gpu-svd-methods": Table(tables.decompositions, ("gpu-svd",)),
    "gpu-pipeline": Table(tables.pipelines, ("gpu-pipeline",)),
}


class RenderError(Exception):
    """A document's markers, or a result file, cannot be used; the message says which."""


def rendered(document: str, results: Path, known: Mapping[str, Table]) -> tuple[str, list[str]]:
    """The document with all its tables made anew, and the names of those that changed.

    Raises:
        RenderError: a marker is not closed or names no table, or a result file is missing or lacks
            what its table shows.
    """
    changed = []

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        body = _made(name, results, known) + "\n"
        if body != match["body"]:
            changed.append(name)
        return f"<!-- table: {name} -->\n{body}<!-- end -->"

    text = _MARKED.sub(replace, document)
    stray = _MARKER.findall(_MARKED.sub("", document))
    nested = [match for match in _MARKED.finditer(document) if _MARKER.search(match["body"])]
    if stray or nested:
        where = stray[0] if stray else f"<!-- table: {nested[0]['name']} -->"
        raise RenderError(
            f"{where} is half of a pair: write <!-- table: NAME --> and <!-- end --> on lines of "
            "their own"
        )
    return text, changed


def _made(name: str, results: Path, known: Mapping[str, Table]) -> str:
    if name not in known:
        raise RenderError(f"there is no table {name!r}: the markers know {', '.join(known)}")
    read = []
    for file in known[name].results:
        path = results / f"{file}.json"
        try:
            read.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RenderError(
                f"table {name} needs {path}, which cannot be read ({error}): run the benchmark "
                "that writes it, see docs/measuring.md"
            ) from error
    try:
        return known[name].make(*read)
    except (KeyError, StopIteration) as error:
        raise RenderError(
            f"table {name} cannot be made: {', '.join(known[name].results)} lacks {error}; run the "
            "benchmark again, see docs/measuring.md"
        ) from error


def documents() -> list[Path]:
    """Those that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def figures() -> dict[Path, bytes]:
    """What each figure of the documents must be: one of the results, or drawn from a result."""
    drawn = {
        f"{file.parent.name}-{file.name}": file.read_bytes() for file in RESULTS.glob("*/*.svg")
    }
    measured = json.loads((RESULTS / "gpu-covariance.json").read_text(encoding="utf-8"))
    drawn["gpu-covariance.svg"] = kernel_figure.draw(measured)
    return {ROOT / "docs" / "figures" / name: drawn[name] for name in sorted(drawn)}


def main(arguments: Sequence[str] | None = None, paths: Sequence[Path] | None = None) -> int:
    """Renders all documents; 1 if --check finds a difference, 2 if something cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only tell")
    check = parser.parse_args(arguments).check
    differ = False
    for path in documents() if paths is None else paths:
        before = path.read_text(encoding="utf-8")
        try:
            text, changed = rendered(before, RESULTS, TABLES)
        except RenderError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        for name in changed:
            differ = True
            print(f"{path}: table {name} {'differs from' if check else 'rewritten from'} {RESULTS}")
        if changed and not check:
            path.write_text(text, encoding="utf-8")
    for file, drawn in figures().items() if paths is None else ():
        if not file.is_file() or file.read_bytes() != drawn:
            differ = True
            print(f"{file}: {'differs from' if check else 'made from'} {RESULTS}")
            if not check:
                file.write_bytes(drawn)
    return int(check and differ)


if __name__ == "__main__":
    sys.exit(main())
