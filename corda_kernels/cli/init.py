"""`corda-kernels init`: a model and text → an adapter, ready to train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from corda_kernels.cli import options
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def init(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter folder to write.")],
    mode: Annotated[
        Literal["kpm", "ipm"],
        typer.Option(help="kpm keeps knowledge (its text in --data), ipm learns a task fast."),
    ],
    data: options.Data = None,
    cov: Annotated[Path | None, typer.Option(help="A covariance file, instead of --data.")] = None,
    rank: Annotated[int, typer.Option(help="Components of each layer.")] = 32,
    field: options.Field = None,
    template: options.Template = None,
    chat_template: options.ChatTemplate = False,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    batch_size: options.BatchSize = 1,
    pack: options.Pack = True,
    targets: options.Targets = "all-linear",
    balance: Annotated[
        Literal["even", "paper"], typer.Option(help="A and B of even RMS, or √σ as published.")
    ] = "even",
    step: Annotated[
        Literal["none", "lora"],
        typer.Option(help="lora: first optimiser steps as large as plain LoRA's."),
    ] = "none",
    residual: Annotated[
        Literal["pair", "weight"],
        typer.Option(help="pair: the base stays untouched; weight: W − BA in the base."),
    ] = "pair",
    damping: options.Damping = 0.01,
    method: Annotated[
        Literal["auto", "exact", "randomized"], typer.Option(help="Of the decomposition.")
    ] = "auto",
    save_base: Annotated[
        bool, typer.Option("--save-base", help="Also store the base that the adapter sits on.")
    ] = False,
    stability: options.Stability = True,
    memory_limit: options.MemoryLimit = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Make an adapter for MODEL from calibration text, in OUT."""
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.initialization import subtract_initial, write_adapter
    from corda_kernels.models import linear_weight, load_tokenizer
    from corda_kernels.pipeline import CordaConfig, check_targets, corda_adapter

    if (data is None) == (cov is None):
        raise ConfigError("give either --data or --cov")
    config = CordaConfig(
        mode=mode,
        rank=rank,
        balance=balance,
        step=None if step == "none" else step,
        residual=residual,
        damping=damping,
        targets=options.parse_targets(targets),
        method=method,
        seed=seed,
        stability=stability,
        memory_limit=options.parse_size(memory_limit),
    )
    options.check_output(out, folder=True)
    covariances = None if cov is None else CovarianceSet.load(cov)
    batches: list[dict[str, Tensor]] = []
    if data is not None:
        text = options.TextOptions(
            data, field, template, chat_template, samples, seq_len, batch_size, pack, seed
        )
        batches = text.batches(load_tokenizer(model))
    network = options.load(model, dtype, device)
    modules = check_targets(network, config)
    needed = sum(8 * rank * sum(linear_weight(module).shape) for module in modules.values())
    if save_base:
        needed += sum(p.numel() * p.element_size() for p in network.parameters())
    options.check_output(out, folder=True, needed_bytes=needed)
    with options.ranks(device) as distributed:
        config = replace(config, distributed=distributed)
        adapter = corda_adapter(network, batches if covariances is None else covariances, config)
    if not options.first_rank():
        return
    if covariances is None:
        adapter.record.calibration["data"] = text.provenance()
    write_adapter(adapter, out)
    typer.echo(
        f"{out}: {mode.upper()} adapter of rank {rank} for {len(adapter.layers)} layers of "
        f"{adapter.record.base_name}"
    )
    _report_stability(adapter.record.stability)
    if save_base:
        if residual == "weight":
            subtract_initial(network, adapter)
        network.save_pretrained(out / "base")
        load_tokenizer(model).save_pretrained(out / "base")
        typer.echo(f"{out / 'base'}: the base that it sits on")
    typer.echo(f'next: model = corda_kernels.load_for_training(base, "{out}"), then train it')


def _report_stability(stability: dict[str, object]) -> None:
    from corda_kernels.planning import Stability

    if stability:
        typer.echo(f"calibration: {Stability.from_json(stability).summary()}")
