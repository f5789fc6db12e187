"""`corda-kernels inspect`: what a covariance file or an adapter holds, as a text table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corda_kernels.cli import options
from corda_kernels.errors import CordaError

if TYPE_CHECKING:
    from corda_kernels.calibration import Covariance
    from corda_kernels.planning import Selection, Stability

_STABILITY_COLUMNS = ("top", "bottom", "verdict")
_SELECTION_COLUMNS = ("chosen", "score min", "max", "spread")


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A covariance file or an adapter folder.")
    ],
) -> None:
    """Show, layer by layer, what FILE holds, and whether it came from enough samples."""
    if file.is_dir():
        _inspect_adapter(file)
    else:
        _inspect_covariances(file)


def _inspect_covariances(file: Path) -> None:
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.progress import progress_bar

    covariances = CovarianceSet.load(file)
    provenance = dict(covariances.provenance)
    stability = _stability(provenance.pop("stability", None))
    selection = _selection(provenance.pop("selection", None))
    cells: dict[str, list[str]] = {}
    for covariance, names in progress_bar(
        covariances.groups(), description="spectra", unit="covariances"
    ):
        described = _describe(covariance)
        cells.update(dict.fromkeys(names, described))
    typer.echo(f"{file}: {len(covariances)} layers, {len(covariances.groups())} covariances")
    _print_notes(provenance)
    _print_table(
        ("layer", "tokens", "in", "condition", "eff. rank", "head", "tail", "outliers"),
        {name: cells[name] for name in covariances},
        stability,
        selection,
    )
    typer.echo(
        "head, tail: largest and smallest eigenvalue over their mean; eff. rank: (Σλ)²/Σλ²; "
        "outliers: channels with |x| above the threshold"
    )
    for name, reason in covariances.left_out.items():
        typer.echo(f"left out: {name}: {reason}")
    _print_verdict(stability, selection)


def _describe(covariance: Covariance) -> list[str]:
    from corda_kernels.decomposition import extreme_eigenvalues
    from corda_kernels.errors import DecompositionError

    matrix = covariance.matrix.double()
    channels = matrix.shape[0]
    mean = float(matrix.diagonal().mean())
    effective = float((mean * channels) ** 2 / matrix.square().sum()) if mean else 0.0
    outliers = int((covariance.outlier_count > 0).sum())
    try:
        largest, smallest = (float(value) for value in extreme_eigenvalues(matrix))
        spectrum = [f"{largest / smallest:.1e}", f"{effective:.1f}"]
        spectrum += [f"{largest / mean:.1e}", f"{smallest / mean:.1e}"]
    except DecompositionError:
        spectrum = ["singular", f"{effective:.1f}", "", "0"]
    return [str(covariance.tokens), str(channels), *spectrum, str(outliers)]


def _inspect_adapter(folder: Path) -> None:
    from corda_kernels.initialization import read_adapter

    record = read_adapter(folder).record
    typer.echo(
        f"{folder}: {record.mode.upper()} adapter of {options.describe_ranks(record)} for "
        f"{len(record.layers)} layers of {record.base_name} (balance {record.balance}, "
        f"step {record.step}, residual {record.residual}, damping {record.damping})"
    )
    notes = dict(record.calibration)
    selection = _selection(notes.pop("selection", None))
    _print_notes(notes)
    stability = _stability(record.stability)
    rows = {
        name: _layer_row(record.layers[name]) if rank else ["", "0", "", "", ""]
        for name, rank in (
            record.allocation.get("ranks") or dict.fromkeys(record.layers, 1)
        ).items()
    }
    header = ("layer", "tokens", "rank", "σ max", "σ min", "scaling")
    _print_table(header, rows, stability, selection)
    _print_verdict(stability, selection)


def _layer_row(layer: Mapping[str, Any]) -> list[str]:
    return [
        str(layer["tokens"]),
        str(layer["rank"]),
        f"{layer['sigma_max']:.2e}",
        f"{layer['sigma_min']:.2e}",
        f"{layer['scaling']:.3g}",
    ]


@contextlib.contextmanager
def _unaltered(note: str) -> Iterator[None]:
    """Turns what reading an altered note raises into an error that says so."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CordaError(
            f"the note on {note} was altered ({error!r}): calibrate again, or copy the file"
        ) from error


@_unaltered("the selection")
def _selection(value: Mapping[str, Any] | None) -> Selection | None:
    from corda_kernels.planning import Selection

    if not value:
        return None
    selection = Selection.from_json(value)
    selection.summary()
    _selection_cells(selection)
    return selection


@_unaltered("stability")
def _stability(value: Mapping[str, Any] | None) -> Stability | None:
    from corda_kernels.planning import Stability

    if not value:
        return None
    stability = Stability.from_json(value)
    stability.summary()
    return stability


def _print_notes(notes: Mapping[str, Any]) -> None:
    for name, value in notes.items():
        if name == "mixture":
            with _unaltered("the mixture"):
                value = options.describe_mixture(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry!r}" for key, entry in value.items() if entry)
        typer.echo(f"{name}: {value}")


def _print_table(
    header: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    stability: Stability | None,
    selection: Selection | None,
) -> None:
    table = [list(header)] + [[name, *cells] for name, cells in rows.items()]
    if selection is not None:
        _add_columns(table, _SELECTION_COLUMNS, _selection_cells(selection))
    if stability is not None:
        _add_columns(table, _STABILITY_COLUMNS, _stability_cells(stability))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        first, *rest = row
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        typer.echo("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())


def _add_columns(
    table: list[list[str]], header: Sequence[str], cells: Mapping[str, Sequence[str]]
) -> None:
    """Adds columns to a table; rows of which there is nothing to say stay empty there."""
    table[0] += header
    for row in table[1:]:
        row += cells.get(row[0], [""] * len(header))


def _stability_cells(stability: Stability) -> dict[str, list[str]]:
    cells = {}
    for name, layer in stability.layers.items():
        shares = ["" if share is None else f"{share:.2f}" for share in (layer.top, layer.bottom)]
        cells[name] = [*shares, stability.verdict(layer)]
    return cells


def _selection_cells(selection: Selection) -> dict[str, list[str]]:
    winners = selection.winners()
    spreads = {
        name: spread
        for names, spread in zip(selection.groups, selection.spreads(), strict=True)
        for name in names
    }
    return {
        name: [
            str(winners[name] + 1) if selection.method == "argmin" else "all",
            f"{min(scores):.4g}",
            f"{max(scores):.4g}",
            f"{spreads[name]:.1%}",
        ]
        for name, scores in selection.scores.items()
    }


def _print_verdict(stability: Stability | None, selection: Selection | None) -> None:
    if selection is not None:
        typer.echo(
            "chosen: the candidate with the lowest score, summed over the layers that read one "
            "input; score: log π(C)·Σσ/σmax of the layer; spread: standard deviation over mean"
        )
        typer.echo(f"selection: {selection.summary()}")
    if stability is None:
        typer.echo("samples: their stability was not measured")
        return
    typer.echo(
        f"top: overlap of the {stability.rank} largest components between the two halves of the "
        "text; bottom: how quiet the smallest of one half are in the other, from random directions "
        "(0) to the quietest there (1, on a logarithmic scale)"
    )
    typer.echo(f"samples: {stability.summary()}")
