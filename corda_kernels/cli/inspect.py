"""`corda-kernels inspect`: what a covariance file or an adapter holds, as a text table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError, CordaError, CovarianceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.planning import Selection, Stability

    _Load = Callable[[], PreTrainedModel]

_STABILITY_COLUMNS = ("top", "bottom", "verdict")
_SELECTION_COLUMNS = ("chosen", "score min", "max", "spread")


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A covariance file or an adapter folder.")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Also write a page with figures.")
    ] = None,
    cov: Annotated[
        Path | None,
        typer.Option(help="On an adapter's page also show its covariances, from `calibrate`."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="On the page also show whole spectra of W·C, of this model's layers."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show, layer by layer, what FILE holds, and whether it came from enough samples."""
    if html is None and (cov or model):
        raise ConfigError("--cov and --model are for a page: give --html PAGE as well")
    if cov is not None and not file.is_dir():
        raise ConfigError(f"{file} is no adapter folder: --cov shows an adapter's covariances")
    if model is not None and cov is None and file.is_dir():
        raise ConfigError("the spectra of W·C take the covariances too: give --cov as well")
    if html is not None:
        from corda_kernels.outputs import check_output
        from corda_kernels.report import check_matplotlib

        check_matplotlib()
        check_output(html)
    load = None
    if model is not None:
        load = partial(options.load, model, None, "auto", trust_remote_code=trust_remote_code)
    if file.is_dir():
        _inspect_adapter(file, html, cov, load)
    else:
        _inspect_covariances(file, html, load)


def _inspect_covariances(file: Path, html: Path | None, load: _Load | None) -> None:
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.report import measure_inputs

    covariances = CovarianceSet.load(file)
    provenance = dict(covariances.provenance)
    stability = _stability(provenance.pop("stability", None))
    selection = _selection(provenance.pop("selection", None))
    inputs = measure_inputs(covariances)
    cells = {name: _describe(entry) for entry in inputs for name in entry["layers"]}
    echo(f"{file}: {len(covariances)} layers, {len(inputs)} covariances")
    _print_notes(provenance)
    _print_table(
        ("layer", "tokens", "in", "condition", "eff. rank", "head", "tail", "outliers"),
        {name: cells[name] for name in covariances},
        stability,
        selection,
    )
    echo(
        "head, tail: largest and smallest eigenvalue over their mean; eff. rank: (Σλ)²/Σλ²; "
        "outliers: channels with |x| above the threshold"
    )
    for name, reason in covariances.left_out.items():
        echo(f"left out: {name}: {reason}")
    _print_verdict(stability, selection)
    if html is not None:
        from corda_kernels.report import DAMPING, covariance_report, write_page

        spectra = _spectra(load, covariances, DAMPING)
        write_page(covariance_report(file.name, covariances, inputs=inputs, spectra=spectra), html)
        echo(f"{html}: the same with figures")


def _spectra(
    load: _Load | None, covariances: CovarianceSet, damping: float
) -> dict[str, dict[str, Any]] | None:
    """Those of W·C of a model's layers, computed on a GPU if there is one."""
    from corda_kernels.models import target_linears
    from corda_kernels.report import measure_spectra

    if load is None:
        return None
    modules = target_linears(load())
    return measure_spectra(modules, covariances, damping=damping)


def _describe(entry: Mapping[str, Any]) -> list[str]:
    if entry.get("smallest"):
        largest, smallest = entry["largest"], entry["smallest"]
        spectrum = [f"{largest / smallest:.1e}", f"{entry['effective_rank']:.1f}"]
        spectrum += [f"{largest:.1e}", f"{smallest:.1e}"]
    else:
        spectrum = ["singular", f"{entry['effective_rank']:.1f}", "", "0"]
    return [str(entry["tokens"]), str(entry["channels"]), *spectrum, str(entry["outliers"])]


def _inspect_adapter(folder: Path, html: Path | None, cov: Path | None, load: _Load | None) -> None:
    from corda_kernels.adapter import read_adapter
    from corda_kernels.adapter.folder import RECORD_FILE
    from corda_kernels.adapter.lora import CONFIG_FILE
    from corda_kernels.calibration import CovarianceSet

    if (folder / CONFIG_FILE).is_file() and not (folder / RECORD_FILE).is_file():
        _inspect_lora(folder)
        return
    adapter = read_adapter(folder)
    record = adapter.record
    covariances = None if cov is None else CovarianceSet.load(cov)
    echo(
        f"{folder}: {record.mode.upper()} adapter of {options.describe_ranks(record)} for "
        f"{len(record.layers)} layers of {record.base_name} "
        f"({'residual weight' if record.hold is None else f'hold {record.hold:g}'}, "
        f"damping {record.damping})"
    )
    notes = dict(record.calibration)
    selection = _selection(notes.pop("selection", None))
    _print_notes(notes)
    stability = _stability(record.stability)
    rows = {
        name: _layer_row(record.layers[name]) if rank else ["", "0", "", ""]
        for name, rank in (
            record.allocation.get("ranks") or dict.fromkeys(record.layers, 1)
        ).items()
    }
    header = ("layer", "tokens", "rank", "σ max", "σ min")
    _print_table(header, rows, stability, selection)
    _print_verdict(stability, selection, record.rank)
    if html is not None:
        from corda_kernels.report import (
            adapter_report,
            measure_inputs,
            with_covariances,
            write_page,
        )

        with _unaltered("the run"):
            report = adapter_report(folder.resolve().name, adapter)
        if covariances is not None:
            spectra = _spectra(load, covariances, report.damping)
            report = with_covariances(report, measure_inputs(covariances), spectra)
        write_page(report, html)
        echo(f"{html}: the same with figures")


def _inspect_lora(folder: Path) -> None:
    """What there is to say of a LoRA without a record, such as an exported one."""
    from corda_kernels.adapter.lora import base_name, lora_layers, read_lora

    config, tensors = read_lora(folder)
    layers = lora_layers(config, tensors, folder)
    ranks = sorted({layer.rank for layer in layers.values()})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    echo(
        f"{folder}: a LoRA of {shown} for {len(layers)} layers of "
        f"{base_name(config) or 'a model without a name'}; it has no corda.json, which would say "
        "how it was made (an exported LoRA has none: inspect the adapter that it came from)"
    )


def _layer_row(layer: Mapping[str, Any]) -> list[str]:
    return [
        str(layer["tokens"]),
        str(layer["rank"]),
        f"{layer['sigma_max']:.2e}",
        f"{layer['sigma_min']:.2e}",
    ]


@contextlib.contextmanager
def _unaltered(note: str) -> Iterator[None]:
    """Turns what reading an altered note raises into an error that says so."""
    try:
        yield
    except (
        CovarianceError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:
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
        echo(f"{name}: {value}")


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
        echo("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())


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


def _print_verdict(
    stability: Stability | None, selection: Selection | None, rank: int | None = None
) -> None:
    if selection is not None:
        echo(
            "chosen: the candidate with the lowest score, summed over the layers that read one "
            "input; score: log π(C)·Σσ/σmax of the layer; spread: standard deviation over mean"
        )
        echo(f"selection: {selection.summary()}")
    if stability is None:
        echo("samples: their stability was not measured")
        return
    echo(
        f"top: overlap of the {stability.rank} largest components between the two halves of the "
        "text; bottom: how quiet the smallest of one half are in the other, from random directions "
        "(0) to the quietest there (1, on a logarithmic scale)"
    )
    echo(f"samples: {stability.summary(rank)}")
