"""`corda-kernels export`: a trained adapter → a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder, trained.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    rank: Annotated[
        int | None,
        typer.Option(help="Rank to cut the LoRA off at; it has twice its components."),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write ADAPTER as a LoRA of one rank and one alpha, for the untouched base."""
    from corda_kernels.adapter import ADAPTER_FILES, export_lora

    options.check_output(out, folder=True)
    options.check_unused(out, overwrite, ADAPTER_FILES)
    written = export_lora(adapter, out, rank)
    lost = (
        f", with {written.error:.2%} of the change lost in {written.layer}, the worst layer"
        if written.layer
        else ""
    )
    echo(
        f"{out}: a plain LoRA of rank {written.rank}{lost}; load it with "
        f"PeftModel.from_pretrained(base, '{out}')"
    )
