"""`corda-kernels inspect`: what a covariance file or an adapter holds, as a text table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corda_kernels.errors import CordaError

if TYPE_CHECKING:
    from corda_kernels.calibration import Covariance
    from corda_kernels.planning import Stability

_STABILITY_COLUMNS = ("top", "bottom", "verdict")


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
    )
    typer.echo(
        "head, tail: largest and smallest eigenvalue over their mean; eff. rank: (Σλ)²/Σλ²; "
        "outliers: channels with |x| above the threshold"
    )
    for name, reason in covariances.left_out.items():
        typer.echo(f"left out: {name}: {reason}")
    _print_verdict(stability)


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
        f"{folder}: {record.mode.upper()} adapter of rank {record.rank} for {len(record.layers)} "
        f"layers of {record.base_name} (balance {record.balance}, step {record.step}, "
        f"residual {record.residual}, damping {record.damping})"
    )
    _print_notes(record.calibration)
    stability = _stability(record.stability)
    rows = {
        name: [
            str(layer["tokens"]),
            str(layer["rank"]),
            f"{layer['sigma_max']:.2e}",
            f"{layer['sigma_min']:.2e}",
            f"{layer['scaling']:.3g}",
        ]
        for name, layer in record.layers.items()
    }
    _print_table(("layer", "tokens", "rank", "σ max", "σ min", "scaling"), rows, stability)
    _print_verdict(stability)


def _stability(value: Mapping[str, Any] | None) -> Stability | None:
    from corda_kernels.planning import Stability

    if not value:
        return None
    try:
        stability = Stability.from_json(value)
        stability.summary()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CordaError(
            f"the note on stability was altered ({error!r}): calibrate again, or copy the file"
        ) from error
    return stability


def _print_notes(notes: Mapping[str, Any]) -> None:
    for name, value in notes.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry!r}" for key, entry in value.items() if entry)
        typer.echo(f"{name}: {value}")


def _print_table(
    header: Sequence[str], rows: Mapping[str, Sequence[str]], stability: Stability | None
) -> None:
    table = [list(header)] + [[name, *cells] for name, cells in rows.items()]
    if stability is not None:
        table[0] += _STABILITY_COLUMNS
        for row in table[1:]:
            layer = stability.layers.get(row[0])
            if layer is not None:
                shares = (layer.top, layer.bottom)
                row += ["" if share is None else f"{share:.2f}" for share in shares]
                row.append(stability.verdict(layer))
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(table[0]))]
    for row in table:
        first, *rest = row
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=False)]
        typer.echo("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())


def _print_verdict(stability: Stability | None) -> None:
    if stability is None:
        typer.echo("samples: their stability was not measured")
        return
    typer.echo(
        f"top: overlap of the {stability.rank} largest components between the two halves of the "
        "text; bottom: how quiet the smallest of one half are in the other, from random directions "
        "(0) to the quietest there (1, on a logarithmic scale)"
    )
    typer.echo(f"samples: {stability.summary()}")
