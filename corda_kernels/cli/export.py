"""`corda-kernels export`: a trained adapter → a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder, trained.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
) -> None:
    """Write ADAPTER as a plain LoRA of twice the rank, for the untouched base."""
    from corda_kernels.initialization import export_lora

    export_lora(adapter, out)
    typer.echo(f"{out}: a plain LoRA; load it with PeftModel.from_pretrained(base, '{out}')")
