"""`corda-kernels calibrate`: a model and text → a covariance file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    from corda_kernels.calibration import CovarianceSet


def calibrate(
    context: typer.Context,
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
    batch_size: options.BatchSize = None,
    pack: options.Pack = True,
    targets: options.Targets = "all-linear",
    candidates: options.Candidates = 1,
    selection: options.Selection = "argmin",
    rank: Annotated[int, typer.Option(help="At which the stability is judged.")] = 32,
    damping: options.Damping = 0.01,
    stability: options.Stability = True,
    memory_limit: options.MemoryLimit = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of this stopped.")
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Keep what is done every so many tokens, for --resume; 0 for never. "
            "By default so many that it takes about 1 % of the time on a CPU; never on a GPU, "
            "whose sums would have to run in one order, which takes longer.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run MODEL over calibration text and write every layer's input covariance to OUT."""
    from corda_kernels.calibration import CalibrationCheckpoint
    from corda_kernels.calibration.covariance import save_pieces
    from corda_kernels.calibration.distributed import Ranks
    from corda_kernels.init import CalibrationPlan, covariance_stages, united_provenance
    from corda_kernels.linears import linear_shape
    from corda_kernels.models import load_tokenizer, target_linears
    from corda_kernels.outputs import format_bytes

    text = options.TextOptions.of(context)
    options.check_output(out)
    options.check_unused(out, overwrite)
    limit = options.parse_size(memory_limit)
    if checkpoint_every is not None and checkpoint_every < 0:
        raise ConfigError(f"--checkpoint-every must be at least 0, got {checkpoint_every}")
    if resume and checkpoint_every == 0:
        raise ConfigError(
            "--resume goes on from a checkpoint, and --checkpoint-every 0 keeps none: leave one of "
            "them out"
        )
    if checkpoint_every is None and not resume and options.resolve_device(device) != "cpu":
        checkpoint_every = 0
    checkpoint = CalibrationCheckpoint(
        out.with_name(f"{out.name}.checkpoint"), checkpoint_every, resume
    )
    if not resume and (left := checkpoint.kept()):
        raise ConfigError(
            f"{left[0]} was left by an interrupted run: give --resume to go on with that, or "
            "delete the file"
        )
    if checkpoint_every != 0:
        options.check_output(checkpoint.longest_path())
    batches = text.batches(load_tokenizer(model, trust_remote_code=trust_remote_code))
    network = options.load(model, dtype, device, trust_remote_code=trust_remote_code)
    chosen = options.parse_targets(targets)
    # Layers of one parent and width mostly share their input: a lower bound of what is written.
    widths = {
        (name.rpartition(".")[0], linear_shape(module)[1])
        for name, module in target_linears(network, chosen).items()
    }
    options.check_output(out, needed_bytes=sum(2 * width * (width + 1) for _, width in widths))
    layers = groups = 0
    notes: list[dict[str, Any]] = []

    def noted(stages: Iterable[CovarianceSet]) -> Iterator[CovarianceSet]:
        nonlocal layers, groups
        for covariances in stages:
            covariances.provenance["data"] = text.provenance()
            notes.append(covariances.provenance)
            layers += len(covariances)
            groups += len(covariances.groups())
            yield covariances
            del covariances  # before the next ones are made

    with options.ranks(device) as distributed:
        plan = CalibrationPlan(
            targets=chosen,
            rank=rank,
            stability=stability,
            damping=damping,
            candidates=candidates,
            selection=selection,
            memory_limit=limit,
            distributed=distributed,
        )
        kept = None if checkpoint_every == 0 else checkpoint
        stages = covariance_stages(network, batches, plan, domain=text.domain(), checkpoint=kept)
        if options.first_rank():
            save_pieces(noted(stages), out, united_provenance)
        else:
            for _ in stages:
                pass
        Ranks.of(distributed).gather(None, "the result is safe")
        checkpoint.discard()
    if not options.first_rank():
        return
    provenance = united_provenance(notes)
    echo(
        f"{out}: {layers} layers, {groups} distinct covariances, {provenance['tokens']} tokens, "
        f"{format_bytes(out.stat().st_size)}"
    )
    options.report_selection(provenance)
    echo(f"next: corda-kernels inspect {out}")
