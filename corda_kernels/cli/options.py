"""Arguments and options that several commands share, and what they stand for."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from typer import Argument, CallbackParam, Context, Option

from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError, DistributedError, OutputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

# Bytes by the unit of a size, in capitals.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: str | None) -> int | None:
    """The number of bytes that a text such as "8GB", "1.5 GiB" or "1000" stands for."""
    if size is None:
        return None
    number = size.rstrip("BIKMGTbikmgt ")
    try:
        return int(float(number) * _UNITS[size[len(number) :].strip().upper()])
    except (KeyError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"{size!r} is not a size: write bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB "
            "or TiB"
        ) from error


def parse_targets(option: CallbackParam, given: str | None) -> str | list[str] | None:
    """The endings in a comma-separated list; a regular expression or "all-linear" as it is."""
    if given is None or given == "all-linear" or re.search(r"[^\w., -]", given):
        return given
    endings = [ending.strip() for ending in given.split(",") if ending.strip()]
    if not endings:
        raise ConfigError(f"{option.opts[0]} is empty: leave it out, or give endings")
    return endings


Model = Annotated[str, Argument(metavar="MODEL", help="Base model: a folder, hub id or GGUF file.")]
Data = Annotated[
    str | None,
    Option(
        metavar="FILE|-|NAME:SPLIT",
        help="Calibration text: a file of text, JSON, JSON lines, CSV or parquet (.gz too, except "
        "parquet); - for standard input; or a hub data set, such as openai/gsm8k:main:train.",
    ),
]
Field = Annotated[str | None, Option(help="Record field that holds the text; by default text.")]
Template = Annotated[
    str | None, Option(help=r"Text of a record's fields, such as 'Q: {question}\nA: {answer[0]}'.")
]
ChatTemplate = Annotated[
    bool, Option("--chat-template", help="Lay conversations out by the tokenizer's chat template.")
]
AnswersOnly = Annotated[
    bool,
    Option("--answers-only", help="Average over the assistant's turns only; the rest is context."),
]
Samples = Annotated[int, Option(min=1, help="Number of sequences to calibrate on.")]
SeqLen = Annotated[int, Option(min=1, help="Number of tokens in each sequence.")]
BatchSize = Annotated[
    int | None,
    Option(min=1, help="Sequences in a forward pass; by default for 2048 tokens, 8192 on a GPU."),
]
Pack = Annotated[
    bool, Option(help="Join documents and cut them into full sequences, or keep them apart.")
]
Targets = Annotated[
    str | None,
    Option(
        callback=parse_targets,
        help="Layers: endings of their names (q_proj,v_proj), a regular expression for whole "
        "names, or all-linear: all linear layers but output heads, which is the default; of a "
        "vision–language model the default is those of its language model.",
    ),
]
Task = Annotated[
    str | None,
    Option(
        help="Task to load the model for, such as causal-lm, seq2seq-lm, sequence-classification "
        "or feature-extraction; by default the one its config names."
    ),
]
Exclude = Annotated[
    str | None,
    Option("--exclude", callback=parse_targets, help="Layers to leave out, written as --targets."),
]
Experts = Annotated[
    Literal["shared", "each"] | None,
    Option(
        help="Adapt the experts of a mixture too. Their gate and up projections have one "
        "covariance a layer (shared) or one an expert (each), down projections one an expert."
    ),
]
Candidates = Annotated[
    int, Option(min=1, help="Samples of the text, --samples sequences each, to choose from.")
]
Selection = Annotated[
    Literal["argmin", "pool"],
    Option(help="Of several --candidates, each layer takes the best (argmin) or all (pool)."),
]
Seed = Annotated[int, Option(help="Random seed of the order of texts and of the decomposition.")]
Device = Annotated[
    str, Option(help="cpu, cuda (under torchrun one GPU a rank), cuda:1, or auto: a GPU if any.")
]
Dtype = Annotated[
    str | None, Option(help="Dtype of the weights, such as bfloat16; by default as stored.")
]
TrustRemoteCode = Annotated[
    bool,
    Option("--trust-remote-code", help="Run Python code that comes with the model; read it first."),
]
Stability = Annotated[
    bool, Option(help="Judge by two halves of the text whether it was enough; takes longer.")
]
MemoryLimit = Annotated[
    str | None,
    Option(
        metavar="SIZE",
        callback=parse_size,
        help="Memory for covariances, such as 8GB; by default no limit. If they need more, the "
        "text goes through the model block by block.",
    ),
]
Sides = Annotated[
    Literal["inputs", "both"], Option(help="both: also take gradients at the layers' outputs.")
]
Labels = Annotated[
    Literal["given", "sampled"] | None,
    Option(
        help="Tokens whose loss these gradients are of: the text's own (given) or drawn from the "
        "model (sampled). By default given; for init in modes kpm and ipm sampled."
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing result in OUT.")]


# What `token_batches` takes as it is given.
_OF_TEXT = ("field", "chat_template", "answers_only", "seq_len", "pack", "seed")


def options_of(kind: type[T], context: Context, **more: Any) -> T:
    """A dataclass made of the command's options that have its fields' names, and of `more`."""
    names = {field.name for field in fields(kind)} & context.params.keys()  # type: ignore[arg-type]
    return kind(**{name: context.params[name] for name in names} | more)


def text_batches(
    given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
    """Token batches of the text that a command's options describe, `samples` for each candidate."""
    from corda_kernels.text import fitting_batch_size, token_batches

    kind = resolve_device(given["device"]).partition(":")[0]
    if given["data"] == "-" and under_torchrun():
        raise ConfigError(
            "--data - is read once, but each rank reads all of the text: write it to a file first"
        )

    def fitting(found: int) -> int:
        return fitting_batch_size(max(1, found // given["candidates"]), given["seq_len"], kind)

    return token_batches(
        given["data"],
        tokenizer,
        samples=given["samples"] * given["candidates"],
        batch_size=given["batch_size"] or fitting,
        template=_template(given),
        **{name: given[name] for name in _OF_TEXT},
    )


def text_provenance(given: Mapping[str, Any]) -> dict[str, Any]:
    """What to note of the text beside the covariances, in JSON's terms."""
    # What of the file's name is not UTF-8 is replaced.
    file = os.fsencode(Path(given["data"]).name).decode(errors="replace")
    samples = given["samples"] * given["candidates"]
    same = {name: given[name] for name in _OF_TEXT}
    return {"file": file, "template": _template(given)} | same | {"samples": samples}


def _template(given: Mapping[str, Any]) -> str | None:
    """The template with the line feeds that it is meant to have."""
    from corda_kernels.documents import decode_escapes

    return None if given["template"] is None else decode_escapes(given["template"])


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def first_rank() -> bool:
    """Whether this process is the one that writes and prints."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def ranks(device: str) -> Iterator[bool]:
    """Joins the ranks that torchrun started, if it did; yields whether there are any."""
    if not under_torchrun():
        yield False
        return
    import torch

    where = torch_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    try:
        torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the ranks cannot be joined ({error}): start the program with torchrun"
        ) from error
    yield True
    # Not after an error: the others may no longer be there to take part in it.
    torch.distributed.destroy_process_group()


def check_unused(path: Path, overwrite: bool, files: re.Pattern[str] | None = None) -> None:
    """Refuses to replace a result that is there already, unless that is asked for.

    Args:
        path: a file, or the folder that `files` are in.
        overwrite: whether it is.
        files: names of the files in a folder that are the result; None for the path itself.
    """
    found = [path] if files is None else sorted(path.glob("*"))
    for file in found if not overwrite else ():
        if file.exists() and (files is None or files.fullmatch(file.name)):
            raise OutputError(
                f"{file} is there already: choose another path, or give --overwrite to replace it"
            )


def load(
    model: str,
    dtype: str | None,
    device: str,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model on its device, without a bar for reading it that errors would have to follow."""
    from transformers.utils import logging

    from corda_kernels.models import load_model

    logging.disable_progress_bar()
    where = resolve_device(device)
    return load_model(
        model, task=task, dtype=dtype, device=where, trust_remote_code=trust_remote_code
    )


def resolve_device(device: str) -> str:
    """The device's name, with "auto" decided: under torchrun, each rank has a GPU of its own.

    Raises:
        ConfigError: a rank is given a GPU by number, or torchrun did not start it, so that which
            GPU is whose is not known.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cpu") or not under_torchrun():
        return device
    rank = os.environ.get("LOCAL_RANK", "")
    if device != "cuda" or not rank.isdecimal():
        raise ConfigError(
            f"--device {device} with a LOCAL_RANK of {rank!r} in the environment gives no rank a "
            "GPU of its own: start the program with torchrun, and give --device cuda"
        )
    return f"cuda:{rank}"


def torch_device(device: str) -> torch.device:
    """The device of that name, see `resolve_device`, on which numbers can be computed."""
    import torch

    try:
        found = torch.zeros(1, device=resolve_device(device))
        found.item()  # which the meta device has none of
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {device!r} is not there ({error}): choose cpu or cuda"
        ) from error
    return found.device


def report_selection(provenance: Mapping[str, Any]) -> None:
    """Says how the candidates compared, if there were several."""
    from corda_kernels.planning import Selection

    if "selection" in provenance:
        echo(f"selection: {Selection.from_json(provenance['selection']).summary()}")
