"""`corda-kernels calibrate`: a model and text → a covariance file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corda_kernels.cli import options


def calibrate(
    model: options.Model,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The covariance file to write (.safetensors).")
    ],
    data: Annotated[Path, typer.Option(help="Calibration text: text or JSON lines (.jsonl).")],
    field: options.Field = None,
    template: options.Template = None,
    chat_template: options.ChatTemplate = False,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    batch_size: options.BatchSize = 1,
    pack: options.Pack = True,
    targets: options.Targets = "all-linear",
    candidates: options.Candidates = 1,
    selection: options.Selection = "argmin",
    rank: Annotated[int, typer.Option(help="At which the stability is judged.")] = 32,
    damping: options.Damping = 0.01,
    stability: options.Stability = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Run MODEL over calibration text and write every layer's input covariance to OUT."""
    from corda_kernels.files import check_output, format_bytes
    from corda_kernels.models import linear_weight, load_tokenizer, target_linears
    from corda_kernels.pipeline import calibrate_candidates, calibrate_halves

    text = options.TextOptions(
        data, field, template, chat_template, samples * candidates, seq_len, batch_size, pack, seed
    )
    check_output(out)
    batches = text.batches(load_tokenizer(model))
    network = options.load(model, dtype, device)
    chosen = options.parse_targets(targets)
    # Layers of one parent and width mostly share their input: a lower bound of what is written.
    widths = {
        (name.rpartition(".")[0], linear_weight(module).shape[1])
        for name, module in target_linears(network, chosen).items()
    }
    check_output(out, needed_bytes=sum(2 * width * (width + 1) for _, width in widths))
    if candidates > 1:
        covariances = calibrate_candidates(
            network,
            batches,
            candidates=candidates,
            selection=selection,
            targets=chosen,
            domain=data.name,
        )
    else:
        covariances = calibrate_halves(
            network,
            batches,
            targets=chosen,
            rank=rank if stability else None,
            damping=damping,
        )
    covariances.provenance["data"] = text.provenance()
    covariances.save(out)
    tokens = covariances.provenance["tokens"]
    typer.echo(
        f"{out}: {len(covariances)} layers, {len(covariances.groups())} distinct covariances, "
        f"{tokens} tokens, {format_bytes(out.stat().st_size)}"
    )
    options.report_selection(covariances.provenance)
    typer.echo(f"next: corda-kernels inspect {out}")
