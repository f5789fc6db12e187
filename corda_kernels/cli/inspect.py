"""`corda-kernels inspect`: what a covariance file or an adapter holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from corda_kernels import outputs
from corda_kernels.cli import options
from corda_kernels.cli.printing import echo, show
from corda_kernels.errors import ConfigError, DataError

if TYPE_CHECKING:
    from corda_kernels.report.content import Report


def inspect(
    file: Annotated[Path, Argument(metavar="FILE", help="A covariance file or an adapter folder.")],
    html: Annotated[
        Path | None, Option(metavar="PAGE", help="Also write a page with figures to this file.")
    ] = None,
    cov: Annotated[
        Path | None, Option(help="The covariance file that FILE was made from, for the page.")
    ] = None,
    model: Annotated[
        str | None, Option(help="The base model, to put the spectra of W·C on the page.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show, layer by layer, what a file or folder holds.

    A covariance file has tokens, outliers and condition of every input; an adapter has rank and
    singular values of every layer, and how it was made. Both say whether there was enough text, if
    that was judged. Lines below the table explain its columns.

    \b
    Examples:
      corda-kernels inspect my-adapter
      corda-kernels inspect my-adapter --cov nq.safetensors --html my-adapter.html
    """
    from corda_kernels.adapter import folder
    from corda_kernels.adapter.lora import CONFIG_FILE
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.report.content import adapter_report, covariance_report, with_covariances
    from corda_kernels.report.measure import measure_inputs, measure_spectra
    from corda_kernels.report.page import check_matplotlib, write_page
    from corda_kernels.targets import target_linears

    if html is None and (cov or model):
        raise ConfigError("--cov and --model are for a page: give --html PAGE as well")
    if cov is not None and not file.is_dir():
        raise ConfigError(f"{file} is no adapter folder: --cov shows an adapter's covariances")
    if model is not None and cov is None and file.is_dir():
        raise ConfigError("the spectra of W·C take the covariances too: give --cov as well")
    if html is not None:
        check_matplotlib()
        outputs.check_output(html)
    if not file.exists():
        raise DataError(f"{file}: no such file or folder")
    if (file / CONFIG_FILE).is_file() and not (file / folder.RECORD_FILE).is_file():
        _inspect_lora(file)
        return
    inputs, covariances = [], None if cov is None else CovarianceSet.load(cov)
    if file.is_dir():
        found = folder.read_adapter(file)
        # What is shown here does without the notes on the run, which may have been altered.
        _show(file, adapter_report(file.name, found, run=False))
        report = adapter_report(file.resolve().name, found, run=html is not None)
    else:
        covariances = CovarianceSet.load(file)
        inputs = measure_inputs(covariances)
        report = covariance_report(file.name, covariances, inputs)
        _show(file, report)
    if html is None:
        return
    if covariances is not None:
        inputs, spectra = inputs or measure_inputs(covariances), None
        if model is not None:
            base = options.load(model, None, "auto", trust_remote_code=trust_remote_code)
            layers = target_linears(base)
            spectra = measure_spectra(layers, covariances, damping=report.damping)
        report = with_covariances(report, inputs, spectra)
    write_page(report, html)
    echo(f"{html}: the same with figures")


def _show(file: Path, report: Report) -> None:
    from corda_kernels.report.table import layer_table

    show(layer_table(replace(report, name=str(file))))
    for name, reason in report.left_out.items():
        echo(f"left out: {name}: {reason}")
    for label, text in report.summary:
        echo(f"{label}: {text}")


def _inspect_lora(folder: Path) -> None:
    """What there is to say of a LoRA without a record, such as an exported one."""
    from corda_kernels.adapter.lora import base_name, lora_layers, read_lora

    lora = read_lora(folder)
    layers = lora_layers(lora)
    ranks = sorted({layer.rank for layer in layers.values()})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    echo(
        f"{folder}: a LoRA of {shown} for {len(layers)} layers of "
        f"{base_name(lora.config) or 'a model without a name'}; it has no corda.json, which "
        "save_adapter writes, but no trainer, PEFT or export: inspect the adapter that it came from"
    )
