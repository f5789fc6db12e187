"""Arguments and options that several commands share, and what they stand for."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError, OutputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = Annotated[str, typer.Argument(help="A folder, a hub id or a GGUF file.", metavar="MODEL")]
Data = Annotated[
    Path | None, typer.Option(help="Calibration text: a text file or JSON lines (.jsonl).")
]
Field = Annotated[str | None, typer.Option(help="JSON field that holds the text.")]
Template = Annotated[
    str | None,
    typer.Option(help=r"Text with JSON fields, such as 'Q: {question}\nA: {answer[0]}'."),
]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Lay texts out by the tokenizer's chat template.")
]
Samples = Annotated[int, typer.Option(help="Number of calibration sequences.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in each sequence.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Sequences in each forward pass.",
        show_default="so many that they make 2048 tokens, 8192 on a GPU",
    ),
]
Pack = Annotated[bool, typer.Option(help="Pack texts into full sequences.")]
Targets = Annotated[
    str,
    typer.Option(help="all-linear, endings separated by commas, or a regular expression."),
]
Candidates = Annotated[
    int,
    typer.Option(help="Samples of the text, each of --samples sequences, to select from."),
]
Selection = Annotated[
    Literal["argmin", "pool"],
    typer.Option(help="argmin: each layer keeps its best candidate; pool: all text counts."),
]
Damping = Annotated[
    float,
    typer.Option(help="Added to each covariance, times its mean diagonal; 0 for none."),
]
Seed = Annotated[int, typer.Option(help="Of the choice of texts and of random starts.")]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1; auto takes a GPU if there is one. Under torchrun cuda is each "
        "rank's own."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16; the checkpoint's own if not given.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with MODEL; read it first."
    ),
]
Stability = Annotated[
    bool, typer.Option(help="Find out whether there are enough samples; takes longer.")
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Of the covariances, such as 8GB; if all take more, the model runs block by block.",
    ),
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a result that OUT holds already.")
]

_DIGITS = 99  # of a size: more than any that is meant, and fewer than a float has room for
_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*(?:([kmgt]?)(i?)b)?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class TextOptions:
    """Where calibration text comes from and how it is cut up; see `token_batches`.

    There are `samples` sequences for each of the candidates.
    """

    data: Path
    field: str | None
    template: str | None
    chat_template: bool
    samples: int
    candidates: int
    seq_len: int
    batch_size: int | None
    pack: bool
    seed: int
    device: str = "cpu"

    @classmethod
    def of(cls, context: typer.Context) -> TextOptions:
        """The options of these names that a command was given."""
        return cls(**{field.name: context.params[field.name] for field in fields(cls)})

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
        """Token batches."""
        from corda_kernels.text import decode_escapes, fitting_batch_size, token_batches

        kind = resolve_device(self.device).partition(":")[0]

        def fitting(found: int) -> int:
            return fitting_batch_size(max(1, found // self.candidates), self.seq_len, kind)

        return token_batches(
            self.data,
            tokenizer,
            samples=self.samples * self.candidates,
            seq_len=self.seq_len,
            batch_size=fitting if self.batch_size is None else self.batch_size,
            field=self.field,
            template=None if self.template is None else decode_escapes(self.template),
            chat_template=self.chat_template,
            pack=self.pack,
            seed=self.seed,
        )

    def domain(self) -> str:
        """What the batches are a sample of."""
        from corda_kernels.files import utf8_name

        return utf8_name(self.data)

    def provenance(self) -> dict[str, Any]:
        """What to note beside the covariances, in JSON's terms."""
        return {
            "file": self.domain(),
            "field": self.field,
            "template": self.template,
            "chat_template": self.chat_template,
            "samples": self.samples * self.candidates,
            "seq_len": self.seq_len,
            "packed": self.pack,
            "seed": self.seed,
        }


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    size = os.environ.get("WORLD_SIZE", "1")
    try:
        return int(size) > 1
    except ValueError as error:
        raise ConfigError(
            f"the environment's WORLD_SIZE, a number of ranks, is {size!r}: unset it, or start "
            "the program with torchrun, which sets it"
        ) from error


def first_rank() -> bool:
    """Whether this process is the one that writes and prints."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


def check_output(path: Path, *, needed_bytes: int = 0, folder: bool = False) -> None:
    """See `corda_kernels.outputs.check_output`; on the rank that writes."""
    from corda_kernels import outputs

    if first_rank():
        outputs.check_output(path, needed_bytes=needed_bytes, folder=folder)


def check_unused(path: Path, overwrite: bool, files: re.Pattern[str] | None = None) -> None:
    """Refuses to replace a result that is there already, unless that is asked for.

    Args:
        path: a file, or the folder that `files` are in.
        overwrite: whether it is.
        files: names of files in a folder that would be replaced.
    """
    if overwrite or not first_rank():
        return
    if files is None:
        taken = path.name if path.exists() else None
    else:
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        taken = next(filter(files.fullmatch, names), None)
    if taken is not None:
        where = path if files is None else path / taken
        raise OutputError(
            f"{where} is there already: choose another path, or give --overwrite to replace it"
        )


@contextlib.contextmanager
def ranks(device: str) -> Iterator[bool]:
    """Joins the ranks that torchrun started, if it did; yields whether there are any."""
    if not under_torchrun():
        yield False
        return
    import torch
    import torch.distributed

    from corda_kernels.errors import DistributedError

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


def load(
    model: str, dtype: str | None, device: str, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model on its device, without a bar for reading it that errors would have to follow."""
    from transformers.utils import logging

    from corda_kernels.models import load_model

    logging.disable_progress_bar()
    return load_model(
        model,
        dtype=dtype,
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )


def resolve_device(device: str) -> str:
    """The device's name, with "auto" decided: under torchrun, each rank has a GPU of its own.

    Raises:
        ConfigError: several ranks of this machine are given the same GPU; or torchrun did not start
            them, so that which GPU is whose is not known.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (device.startswith("cuda") and under_torchrun()):
        return device
    if device == "cuda":
        if not (rank := os.environ.get("LOCAL_RANK", "")).isdecimal():
            raise ConfigError(
                f"the environment has a WORLD_SIZE, but its LOCAL_RANK is {rank!r}: start the "
                "program with torchrun, which sets both, or name the GPU (--device cuda:0)"
            )
        return f"cuda:{rank}"
    if (ranks := os.environ.get("LOCAL_WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"--device {device} puts all {ranks} ranks of this machine on one GPU: give --device "
            "cuda, by which each takes its own"
        )
    return device


def torch_device(device: str) -> torch.device:
    """The device of that name, see `resolve_device`, on which numbers can be computed."""
    import torch

    try:
        found = torch.device(resolve_device(device))
        if found.type == "meta":
            raise ConfigError("device meta holds no numbers: choose cpu or cuda")
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {device!r} is not there ({error}): choose cpu or cuda"
        ) from error
    return found


def parse_size(size: str | None) -> int | None:
    """The number of bytes that a text such as "8GB", "1.5 GiB" or "1000" stands for."""
    if size is None:
        return None
    match = _SIZE.fullmatch(size.strip())
    if match is None or len(size) > _DIGITS:
        raise ConfigError(
            f"{size!r} is not a size: write bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB "
            "or TiB"
        )
    number, prefix, binary = match.groups(default="")
    power = " kmgt".index(prefix.lower() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_targets(targets: str, option: str = "--targets") -> str | list[str]:
    """The endings in a comma-separated list; a regular expression or "all-linear" as it is."""
    plain = all(letter.isalnum() or letter in "_.,- " for letter in targets)
    if targets == "all-linear" or not plain:
        return targets
    endings = [ending.strip() for ending in targets.split(",") if ending.strip()]
    if not endings:
        raise ConfigError(f"{option} is empty: leave it out, or give endings or an expression")
    return endings


def parse_mixture(parts: Sequence[str]) -> dict[Path, float]:
    """Weights by covariance file, of arguments such as a.safetensors=0.7."""
    mixture: dict[Path, float] = {}
    for part in parts:
        file, equals, weight = part.rpartition("=")
        try:
            mixture[Path(file)] = float(weight)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(
                f"--mix {part!r} is not FILE=WEIGHT, such as knowledge.safetensors=0.7"
            )
    if len(mixture) < len(parts):
        raise ConfigError("--mix names a file twice: give each one weight")
    return mixture


def report_selection(provenance: Mapping[str, Any]) -> None:
    """Says how the candidates compared, if there were several."""
    from corda_kernels.planning import Selection

    if "selection" in provenance:
        echo(f"selection: {Selection.from_json(provenance['selection']).summary()}")
