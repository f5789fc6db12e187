"""`corda-kernels init`: a model and text → an adapter, ready to train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from corda_kernels.adapter import AdapterRecord


def init(
    context: typer.Context,
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter folder to write.")],
    mode: Annotated[
        Literal["kpm", "ipm"],
        typer.Option(help="kpm keeps knowledge (its text in --data), ipm learns a task fast."),
    ],
    data: options.Data = None,
    cov: Annotated[Path | None, typer.Option(help="A covariance file, instead of --data.")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE=WEIGHT", help="Covariance files to mix, instead; once for each file."
        ),
    ] = None,
    rank: Annotated[
        int, typer.Option(help="Components of each layer; the LoRA has twice that rank.")
    ] = 32,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE|r=RANK",
            help="Share out adapter parameters over the layers, instead of --rank: a number "
            "(2500000), a share of the model (1%), or those of a rank in all layers (r=32).",
        ),
    ] = None,
    min_rank: Annotated[int, typer.Option(help="Of every layer, under a budget.")] = 0,
    max_rank: Annotated[int | None, typer.Option(help="Of any layer, under a budget.")] = None,
    rank_multiple: Annotated[
        int, typer.Option(help="Of which each rank is a multiple, under a budget.")
    ] = 1,
    candidates: options.Candidates = 1,
    selection: options.Selection = "argmin",
    field: options.Field = None,
    template: options.Template = None,
    chat_template: options.ChatTemplate = False,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    batch_size: options.BatchSize = None,
    pack: options.Pack = True,
    targets: options.Targets = "all-linear",
    exclude: Annotated[
        str | None, typer.Option(help="Layers to leave out, written as --targets are.")
    ] = None,
    hold: Annotated[
        float,
        typer.Option(help="How firmly training is held to the components, such as 1 or 8."),
    ] = 1.0,
    residual: Annotated[
        Literal["none", "weight"],
        typer.Option(help="weight: the published form, with W − BA in the base."),
    ] = "none",
    damping: options.Damping = 0.01,
    method: Annotated[
        Literal["auto", "exact", "randomized"], typer.Option(help="Of the decomposition.")
    ] = "auto",
    save_base: Annotated[
        bool, typer.Option("--save-base", help="Also store W − BA, with --residual weight.")
    ] = False,
    overwrite: options.Overwrite = False,
    stability: options.Stability = False,
    memory_limit: options.MemoryLimit = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Make an adapter for MODEL from calibration text, in OUT."""
    from corda_kernels.adapter import (
        ADAPTER_FILES,
        check_adapter_folder,
        model_card,
        subtract_initial,
        write_adapter,
    )
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.init import (
        CordaConfig,
        adapter_parameters,
        check_targets,
        corda_adapter,
    )
    from corda_kernels.models import MODEL_FILES, load_tokenizer, save_model
    from corda_kernels.planning import mix_covariances
    from corda_kernels.report import describe_mixture, describe_ranks

    if sum(bool(source) for source in (data, cov, mix)) != 1:
        raise ConfigError("give one of --data, --cov and --mix")
    if data is None and (field or template or chat_template):
        raise ConfigError("--field, --template and --chat-template are of --data")
    if data is None and candidates > 1:
        raise ConfigError("--candidates are samples of --data: they are selected in calibration")
    if data is None and memory_limit is not None:
        raise ConfigError(
            "--memory-limit is of a calibration on --data: covariance files are read whole"
        )
    if save_base and residual == "none":
        raise ConfigError(
            "--save-base stores the base without the part that --residual weight takes out of it: "
            "otherwise the adapter sits on MODEL as it is"
        )
    config = CordaConfig(
        mode=mode,
        rank=rank,
        budget=budget,
        min_rank=min_rank,
        max_rank=max_rank,
        rank_multiple=rank_multiple,
        candidates=candidates,
        selection=selection,
        hold=hold,
        residual=None if residual == "none" else residual,
        exclude_modules=None if exclude is None else options.parse_targets(exclude, "--exclude"),
        damping=damping,
        targets=options.parse_targets(targets),
        method=method,
        seed=seed,
        stability=stability,
        memory_limit=options.parse_size(memory_limit),
    )
    if options.first_rank():
        check_adapter_folder(out)
    options.check_unused(out, overwrite, ADAPTER_FILES)
    if save_base:
        options.check_unused(out / "base", overwrite, MODEL_FILES)
    covariances = None if cov is None else CovarianceSet.load(cov)
    if mix:
        mixture = options.parse_mixture(mix)
        covariances = mix_covariances(
            [CovarianceSet.load(file) for file in mixture], list(mixture.values())
        )
        covariances.provenance["mixture"]["files"] = [file.name for file in mixture]
    batches: list[dict[str, Tensor]] = []
    if data is not None:
        text = options.TextOptions.of(context)
        batches = text.batches(load_tokenizer(model, trust_remote_code=trust_remote_code))
    network = options.load(model, dtype, device, trust_remote_code=trust_remote_code)
    modules = check_targets(network, config)
    # In float32; with a residual the initial factors too.
    needed = (4 if residual == "none" else 8) * adapter_parameters(network, modules, config)
    if save_base:
        needed += sum(p.numel() * p.element_size() for p in network.parameters())
    options.check_output(out, folder=True, needed_bytes=needed)
    with options.ranks(device) as distributed:
        config = replace(config, distributed=distributed)
        if covariances is None:
            adapter = corda_adapter(network, batches, config, domain=text.domain())
        else:
            adapter = corda_adapter(network, covariances, config)
    if not options.first_rank():
        return
    if covariances is None:
        adapter.record.calibration["data"] = text.provenance()
    write_adapter(adapter, out)
    form = "" if residual == "weight" else f": a LoRA of rank {config.rows * adapter.record.rank}"
    echo(
        f"{out}: {mode.upper()} adapter of {describe_ranks(adapter.record)} for "
        f"{len(adapter.layers)} layers of {adapter.record.base_name}{form}"
    )
    if mix:
        mixed = describe_mixture(adapter.record.calibration["mixture"])
        echo(f"mixture: {mixed}")
    options.report_selection(adapter.record.calibration)
    _report_stability(adapter.record, asked=stability and bool(data) and candidates == 1)
    if save_base and adapter.initial is not None:
        subtract_initial(network, adapter.initial)
        made = (
            "W − B A of the adapter beside it stands in the adapted layers: by itself it is no "
            "useful model. Load it with that adapter (corda_kernels.load_for_training)."
        )
        card = model_card(model, "Residual of a CorDA adapter", made)
        save_model(
            network,
            out / "base",
            source=model,
            card=card,
            trust_remote_code=trust_remote_code,
        )
        echo(f"{out / 'base'}: the base that it sits on")
    load = "PeftModel.from_pretrained(base, OUT, is_trainable=True)"
    if residual == "weight":
        load = "corda_kernels.load_for_training(base, OUT)"
    echo(f"next: model = {load.replace('OUT', repr(str(out)))}, then train it")


def _report_stability(record: AdapterRecord, *, asked: bool) -> None:
    from corda_kernels.planning import Stability

    if record.stability:
        echo(f"calibration: {Stability.from_json(record.stability).summary(record.rank)}")
    elif asked:
        echo(
            "calibration: whether the text was enough is not known, for it fills one batch: use "
            "more text or a smaller --batch-size"
        )
