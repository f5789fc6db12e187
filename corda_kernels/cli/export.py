"""`corda-kernels export` and `merge`: a trained adapter → a plain LoRA, or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from corda_kernels import outputs
from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ModelError, OutputError

Adapter = Annotated[Path, Argument(metavar="ADAPTER", help="The folder of a trained adapter.")]


def export(
    adapter: Adapter,
    out: Annotated[Path, Argument(metavar="OUT", help="The LoRA folder to write.")],
    rank: Annotated[
        int | None,
        Option(help="Rank of the exported LoRA, by an SVD of each layer; by default its own."),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a trained adapter as a plain LoRA of one rank.

    Some serving engines read one rank and one alpha for all layers. OUT has that, fits the
    untouched base whatever the adapter's form, and may have a smaller --rank. Needs no base model.

    \b
    Example:
      corda-kernels export my-adapter my-lora --rank 32

    Prints the rank and, with --rank, the share of the change that was lost: of all layers
    together, in the median and in the worst layer.
    """
    from corda_kernels.adapter import export_lora
    from corda_kernels.adapter.folder import ADAPTER_FILES

    outputs.check_output(out, folder=True)
    options.check_unused(out, overwrite, ADAPTER_FILES)
    written = export_lora(adapter, out, rank)
    note = ""
    if written.layer:
        note = (
            f", with {written.total:.2%} of the change lost (median of the layers "
            f"{written.median:.2%}, worst {written.error:.2%} in {written.layer})"
        )
    elif rank is not None and rank > written.rank:
        note = f", its own: --rank {rank} would be more"
    echo(
        f"{out}: a plain LoRA of rank {written.rank}{note}; load it with "
        f"PeftModel.from_pretrained(base, '{out}')"
    )


def merge(
    adapter: Adapter,
    out: Annotated[Path, Argument(metavar="OUT", help="The model folder to write.")],
    model: Annotated[
        str | None,
        Option(help="The base: a folder, hub id or GGUF file; by default that named in ADAPTER."),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    task: options.Task = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Add a trained adapter to its base model's weights.

    Use it for engines without LoRA. OUT is a plain model with its tokenizer, as large as the
    base. A quantised base is rejected: export the adapter instead.

    \b
    Example:
      corda-kernels merge my-adapter my-model --model MODEL
    """
    from corda_kernels import adapter as adapters
    from corda_kernels.adapter.card import render_card
    from corda_kernels.adapter.lora import base_name, read_lora
    from corda_kernels.models import MODEL_FILES, save_model

    source = model or base_name(read_lora(adapter).config)
    outputs.check_output(out, folder=True)
    if source is None:
        raise ModelError(f"{adapter} does not name its base model: give --model")
    if any((out / name).exists() for name in ("adapter_config.json", "corda.json")):
        raise OutputError(
            f"{out} holds an adapter, which transformers would load on top of the merged model: "
            "choose another folder"
        )
    if Path(source).is_dir() and out.resolve() == Path(source).resolve():
        raise OutputError(f"{out} is the base itself: choose another folder")
    options.check_unused(out, overwrite, MODEL_FILES)
    trusted = trust_remote_code
    try:
        network = options.load(source, dtype, device, task=task, trust_remote_code=trusted)
    except ModelError as error:
        remedy = "" if model else "; if the base is elsewhere, give --model"
        raise ModelError(f"{error}{remedy}") from error
    size = network.get_memory_footprint(return_buffers=False)
    outputs.check_output(out, folder=True, needed_bytes=size)
    merged: Any = adapters.merge(adapters.load_for_training(network, adapter))
    made = f"{source} with the LoRA of {adapter.resolve().name} folded into its weights."
    card = render_card(source, "Merged model", made)
    save_model(merged, out, source=source, card=card, trust_remote_code=trusted)
    echo(f"{out}: a plain model; load it with {type(merged).__name__}.from_pretrained('{out}')")
