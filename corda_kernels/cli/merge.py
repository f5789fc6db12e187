"""`corda-kernels merge`: a trained adapter → a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder, trained.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="The base; the one noted in the adapter if not given.")
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Fold ADAPTER into its base model and write the result with its tokenizer."""
    from corda_kernels.adapter import load_for_training, model_card
    from corda_kernels.adapter import merge as merge_into_base
    from corda_kernels.adapter.folder import base_name, read_lora
    from corda_kernels.errors import ModelError, OutputError
    from corda_kernels.models import MODEL_FILES, save_model
    from corda_kernels.outputs import check_output

    named = base_name(read_lora(adapter).config)
    check_output(out, folder=True)
    source = model or named
    if source is None:
        raise ModelError(f"{adapter} does not say where its base is: say so with --model")
    if any((out / name).exists() for name in ("adapter_config.json", "corda.json")):
        raise OutputError(
            f"{out} holds an adapter, which would be loaded on the merged model: choose another "
            "folder"
        )
    if Path(source).is_dir() and out.resolve() == Path(source).resolve():
        raise OutputError(f"{out} is the base itself: choose another folder")
    options.check_unused(out, overwrite, MODEL_FILES)
    try:
        network = options.load(source, dtype, device, trust_remote_code=trust_remote_code)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"{error}; say where the base is with --model") from error
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    check_output(out, folder=True, needed_bytes=size)
    merged: Any = merge_into_base(load_for_training(network, adapter))
    made = f"{source} with the LoRA of {adapter.resolve().name} folded into its weights."
    save_model(
        merged,
        out,
        source=source,
        card=model_card(source, "Merged model", made),
        trust_remote_code=trust_remote_code,
    )
    echo(f"{out}: a plain model; load it with AutoModelForCausalLM.from_pretrained('{out}')")
