"""`corda-kernels init`: a model and text → an adapter, ready to train."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Context, Option

from corda_kernels import outputs
from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from corda_kernels.adapter import AdapterRecord
    from corda_kernels.calibration import CovarianceSet


def init(
    context: Context,
    model: options.Model,
    out: Annotated[Path, Argument(metavar="OUT", help="The adapter folder to write.")],
    mode: Annotated[
        Literal["kpm", "ipm", "task"],
        Option(
            help="kpm: train the smallest components, to keep what the text shows; ipm: the "
            "largest, to learn it; task: start from the gradient of the text's loss."
        ),
    ],
    data: options.Data = None,
    keep: Annotated[
        Path | None,
        Option(
            help="Text of the knowledge to keep, or its covariance file, with --mode task.",
        ),
    ] = None,
    keep_field: Annotated[str | None, Option(help="Like --field, for --keep.")] = None,
    keep_template: Annotated[str | None, Option(help="Like --template, for --keep.")] = None,
    cov: Annotated[Path | None, Option(help="Covariance file, in place of --data.")] = None,
    mix: Annotated[
        list[str] | None,
        Option(metavar="FILE=WEIGHT", help="Covariance file to mix; give several."),
    ] = None,
    rank: Annotated[
        int,
        Option(
            help="Components of each layer. The LoRA's rank is twice that; with --mode task or "
            "--residual weight it is the same."
        ),
    ] = 32,
    budget: Annotated[
        str | None,
        Option(
            help="Adapter parameters to share out over the layers, in place of --rank: 2500000, 1% "
            "of the model, or r=32, as many as that rank takes."
        ),
    ] = None,
    min_rank: Annotated[int, Option(help="Fewest components of a layer under a budget.")] = 0,
    max_rank: Annotated[
        int | None, Option(help="Most components of a layer under a budget.")
    ] = None,
    rank_multiple: Annotated[int, Option(help="Round ranks down to a multiple of this.")] = 1,
    candidates: options.Candidates = 1,
    selection: options.Selection = "argmin",
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
    exclude_modules: options.Exclude = None,
    hold: Annotated[
        float,
        Option(
            help="Factor on the initial lengths in the LoRA, from 1 to 16. The larger, the closer "
            "training stays to the chosen components."
        ),
    ] = 1.0,
    residual: Annotated[
        Literal["none", "weight"],
        Option(help="weight: CorDA's published form, for which the base becomes W − BA."),
    ] = "none",
    sides: options.Sides = "inputs",
    labels: options.Labels = None,
    freeze_a: Annotated[bool, Option("--freeze-a", help="Train only B, with --mode task.")] = False,
    damping: Annotated[
        float,
        Option(help="Share of its mean diagonal added to each covariance's diagonal; 0: none."),
    ] = 0.01,
    method: Annotated[
        Literal["auto", "exact", "randomized"],
        Option(help="exact: a dense SVD; randomized: an iteration; auto: by size."),
    ] = "auto",
    save_base: Annotated[
        bool, Option("--save-base", help="Also write the base W − BA to OUT/base.")
    ] = False,
    overwrite: options.Overwrite = False,
    stability: options.Stability = False,
    memory_limit: options.MemoryLimit = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    task: options.Task = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Make an adapter from calibration text.

    Give a sample of the knowledge to keep (--mode kpm) or of the task to learn (ipm, task), as text
    (--data), as a covariance file (--cov) or as a mixture of several (--mix).

    \b
    Examples:
      corda-kernels init MODEL my-adapter --mode ipm --data my-task.jsonl \\
          --template 'Question: {question}\\nAnswer: {answer}' --samples 64 --seq-len 512
      corda-kernels init MODEL my-adapter --mode kpm --cov nq.safetensors --rank 16

    OUT is a folder that PEFT loads on the unchanged base: PeftModel.from_pretrained(base, OUT,
    is_trainable=True). The adapter starts at zero, so that nothing changes before training.
    """
    from corda_kernels import models
    from corda_kernels.adapter import attach, save_adapter, write_adapter
    from corda_kernels.adapter.attaching import subtract_initial
    from corda_kernels.adapter.card import render_card
    from corda_kernels.adapter.folder import ADAPTER_FILES, check_adapter_folder
    from corda_kernels.init import CordaConfig, check_targets, corda_adapter
    from corda_kernels.report.content import describe_mixture, describe_ranks

    given, first, published = context.params, options.first_rank(), residual == "weight"
    if sum(bool(source) for source in (data, cov, mix)) != 1:
        raise ConfigError("give exactly one of --data, --cov and --mix")
    layout = (field, template, chat_template, answers_only)
    if data is None and any((*layout, candidates > 1, memory_limit is not None)):
        raise ConfigError(
            "--field, --template, --chat-template, --answers-only, --candidates and --memory-limit "
            "are about text (--data): leave them out with --cov and --mix"
        )
    if save_base and not published:
        raise ConfigError(
            "--save-base goes with --residual weight, which changes the base: leave it out, since "
            "this adapter fits MODEL as it is"
        )
    if keep is None and (keep_field or keep_template):
        raise ConfigError("--keep-field and --keep-template describe --keep: give it too")
    form = "weight" if published else None
    config = options.options_of(CordaConfig, context, residual=form)
    if first:
        check_adapter_folder(out)
        options.check_unused(out, overwrite, ADAPTER_FILES)
        if save_base:
            options.check_unused(out / "base", overwrite, models.MODEL_FILES)
    text: dict[str, Any] = {}
    source: CovarianceSet | list[dict[str, Tensor]]
    kept: CovarianceSet | list[dict[str, Tensor]] | None = None
    of_keep = {"data": keep, "field": keep_field, "template": keep_template, "candidates": 1}
    if keep_field or keep_template:  # and no conversations, whatever the task's text is
        of_keep |= {"chat_template": False, "answers_only": False}
    if data is None:
        source = _covariances(cov, mix)
    else:
        text = options.text_provenance(given)
        tokenizer = models.load_tokenizer(model, trust_remote_code=trust_remote_code)
        source = options.text_batches(given, tokenizer)
    if keep is not None and keep.suffix == ".safetensors":
        kept = _covariances(keep, None)
    elif keep is not None:
        tokenizer = models.load_tokenizer(model, trust_remote_code=trust_remote_code)
        try:
            kept = options.text_batches(given | of_keep, tokenizer)
        except DataError as error:
            says = re.sub(r"--(field|template)", r"--keep-\1", str(error))
            raise DataError(says) from error
    trusted = trust_remote_code
    network = options.load(model, dtype, device, task=task, trust_remote_code=trusted)
    # In float32; with a residual the initial factors too.
    needed = (8 if published else 4) * check_targets(network, config).parameters
    if save_base:
        needed += network.get_memory_footprint(return_buffers=False)
    if first:
        outputs.check_output(out, folder=True, needed_bytes=needed)
    with options.ranks(device) as distributed:
        config = replace(config, distributed=distributed)
        made = corda_adapter(network, source, config, domain=text.get("file", ""), keep=kept)
    if not first:
        return
    record = made.record
    if text:
        record.calibration["data"] = text
    if isinstance(kept, list):
        record.calibration["keep"]["data"] = options.text_provenance(given | of_keep)
    if record.lora.get("modules_to_save"):  # which are in a model only
        save_adapter(attach(network, made), out)
    else:
        write_adapter(made, out)
    lora = "" if published else f": a LoRA of rank {config.rows * record.rank}"
    echo(
        f"{out}: {mode.upper()} adapter of {describe_ranks(record)} for {len(made.layers)} layers "
        f"of {record.base_name}{lora}"
    )
    if mix:
        echo(f"mixture: {describe_mixture(record.calibration['mixture'])}")
    options.report_selection(record.calibration)
    _report_stability(record, asked=stability and bool(data) and candidates == 1)
    base: str | Path = model
    if save_base and made.initial is not None:
        subtract_initial(network, made.initial)
        card = render_card(
            model,
            "Residual of a CorDA adapter",
            "W − B A of the adapter beside it stands in the adapted layers: by itself it is no "
            "useful model. Load it with that adapter (corda_kernels.load_for_training).",
        )
        base = out / "base"
        models.save_model(network, base, source=model, card=card, trust_remote_code=trusted)
        echo(f"{base}: the base that it sits on")
    loaded = f"corda_kernels.load_model('{base}')"
    echo(f"next: model = corda_kernels.load_for_training({loaded}, '{out}'), then train it")


def _covariances(cov: Path | None, mix: list[str] | None) -> CovarianceSet:
    """Those of a file, or a mixture of several."""
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.planning import mix_covariances

    if cov is not None:
        return CovarianceSet.load(cov)
    parts = mix or []
    try:
        mixture = {Path(file): float(weight) for file, weight in (p.rsplit("=", 1) for p in parts)}
    except ValueError as error:
        raise ConfigError(
            f"--mix {' '.join(parts)!r} is not FILE=WEIGHT, such as knowledge.safetensors=0.7"
        ) from error
    if len(mixture) < len(parts):
        raise ConfigError("--mix names a file twice: give each one weight")
    mixed = mix_covariances([CovarianceSet.load(file) for file in mixture], [*mixture.values()])
    mixed.provenance["mixture"]["files"] = [file.name for file in mixture]
    return mixed


def _report_stability(record: AdapterRecord, *, asked: bool) -> None:
    from corda_kernels.planning import Stability

    if record.stability:
        echo(f"calibration: {Stability.from_json(record.stability).summary(record.rank)}")
    elif asked:
        echo(
            "calibration: the text fills one batch, which has no halves to compare: use more text "
            "or a smaller --batch-size"
        )
