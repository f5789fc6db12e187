"""`corda-kernels calibrate`: a model and text → a covariance file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from corda_kernels import outputs
from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    from corda_kernels.calibration import CovarianceSet


def calibrate(
    context: Context,
    model: options.Model,
    out: Annotated[Path, Argument(metavar="OUT", help="The .safetensors file to write.")],
    data: options.Data,
    field: options.Field = None,
    template: options.Template = None,
    chat_template: options.ChatTemplate = False,
    answers_only: options.AnswersOnly = False,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    batch_size: options.BatchSize = None,
    pack: options.Pack = True,
    targets: options.Targets = None,
    experts: options.Experts = None,
    candidates: options.Candidates = 1,
    selection: options.Selection = "argmin",
    sides: options.Sides = "inputs",
    labels: options.Labels = None,
    rank: Annotated[int, Option(help="Number of components that --stability compares.")] = 32,
    damping: Annotated[
        float, Option(help="Damping for --stability and --candidates; the file has none.")
    ] = 0.01,
    stability: options.Stability = True,
    memory_limit: options.MemoryLimit = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue an interrupted run with the same options.")
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        Option(
            min=0,
            metavar="TOKENS",
            help="Tokens between two checkpoints for --resume; 0 for none. By default so many that "
            "writing takes about 1 % of the time on a CPU, and none on a GPU.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    task: options.Task = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write the covariance of every layer's inputs to a file.

    Runs the model over the text. One file serves adapters of modes kpm and ipm of any rank (init
    --cov), mixtures (init --mix) and inspect.

    \b
    Example:
      corda-kernels calibrate MODEL nq.safetensors --data nq_open.jsonl \\
          --template 'Q: {question}\\nA: {answer[0]}' --samples 64 --seq-len 512

    Prints the number of layers and tokens, whether the text was enough, and the file's size. Until
    it ends, checkpoints lie beside OUT.
    """
    from corda_kernels import models
    from corda_kernels.calibration import CalibrationCheckpoint
    from corda_kernels.calibration.covariance_set import save_pieces
    from corda_kernels.calibration.distributed import Ranks
    from corda_kernels.calibration.experts import by_parameter
    from corda_kernels.calibration.needs import covariance_bytes
    from corda_kernels.init import CalibrationPlan, covariance_stages, united_provenance

    first, text = options.first_rank(), options.text_provenance(context.params)
    if resume and checkpoint_every == 0:
        raise ConfigError(
            "--resume continues from a checkpoint, and --checkpoint-every 0 writes none: leave one "
            "of them out"
        )
    if checkpoint_every is None and not resume and options.resolve_device(device) != "cpu":
        checkpoint_every = 0
    checkpoint = CalibrationCheckpoint(f"{out}.checkpoint", checkpoint_every, resume)
    if first:
        outputs.check_output(out)
        options.check_unused(out, overwrite)
        if checkpoint_every != 0:
            outputs.check_output(checkpoint.longest_path())
    if not resume and (left := checkpoint.kept()):
        raise ConfigError(
            f"{left[0]} was left by an interrupted run: give --resume to continue it, or delete "
            "the file"
        )
    tokenizer = models.load_tokenizer(model, trust_remote_code=trust_remote_code)
    batches = options.text_batches(context.params, tokenizer)
    trusted = trust_remote_code
    network = options.load(model, dtype, device, task=task, trust_remote_code=trusted)
    if first:
        # Written is one triangle of each.
        needed = covariance_bytes(network, targets, experts, sides)[0] // 2
        outputs.check_output(out, needed_bytes=needed)
    layers = own = groups = 0
    notes: list[dict[str, Any]] = []

    def noted(stages: Iterator[CovarianceSet]) -> Iterator[CovarianceSet]:
        nonlocal layers, own, groups
        for covariances in stages:
            covariances.provenance["data"] = text
            notes.append(covariances.provenance)
            experts = sum(map(len, by_parameter(covariances).values()))
            layers, own = layers + len(covariances) - experts, own + experts
            groups += len(covariances.groups())
            yield covariances
            del covariances  # before the next ones are made

    with options.ranks(device) as distributed:
        plan = options.options_of(CalibrationPlan, context, distributed=distributed)
        kept = None if checkpoint_every == 0 else checkpoint
        stages = covariance_stages(network, batches, plan, domain=text["file"], checkpoint=kept)
        if first:
            save_pieces(noted(stages), out, united_provenance)
        else:
            for _ in stages:
                pass
        Ranks.of(distributed).gather(None, "the result is safe")
        checkpoint.discard()
    if not first:
        return
    provenance = united_provenance(notes)
    also = f" and inputs of {own} experts" if own else ""
    echo(
        f"{out}: {layers} layers{also}, {groups} distinct covariances, {provenance['tokens']} "
        f"tokens, {outputs.format_bytes(out.stat().st_size)}"
    )
    options.report_selection(provenance)
    echo(f"next: corda-kernels inspect {out}")
