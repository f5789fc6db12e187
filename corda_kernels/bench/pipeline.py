"""The whole initialisation against PEFT's own: the same model, tokens, layers and rank.

Every contestant runs in a process of its own, so that none finds memory or caches that another has
left.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.errors import CordaError
from corda_kernels.usage import peak_bytes

CONTESTANTS = ("peft", "patch_peft", "init_corda")

# Least overlap (smallest cosine between subspaces, median over the layers) at which the same was
# computed. For the smallest components PEFT's float32 leaves no such agreement to test.
_SAME_SUBSPACE = 0.999

Mode = Literal["ipm", "kpm"]


@dataclass(frozen=True)
class Task:
    """What to initialise.

    Attributes:
        model: folder of the model.
        batches: token ids (1, seq), for PEFT takes one sequence at a time.
        mode: "ipm" or "kpm".
        rank: of every layer.
    """

    model: str
    batches: list[Tensor]
    mode: Mode
    rank: int


@dataclass(frozen=True)
class PipelineRow:
    """One contestant's run.

    Attributes:
        name: of the contestant.
        seconds: of the whole initialisation, once.
        forward: seconds of the bare forward passes that it makes: with the output head where the
            caller runs the model, without it in init_corda.
        growth: bytes by which the peak of the process's memory rose over that of the loaded model
            and its forward pass.
        overlap: median over the layers of the smallest cosine between its subspaces and PEFT's;
            None where it was not compared.
        passed: whether it computed what PEFT did, as far as it was compared.
    """

    name: str
    seconds: float
    forward: float
    growth: int
    overlap: float | None = None
    passed: bool = True

    @property
    def beyond(self) -> float:
        """Seconds beyond the bare forward pass."""
        return self.seconds - self.forward

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"beyond": self.beyond}


def bench_pipeline(task: Task, names: tuple[str, ...] = CONTESTANTS) -> list[PipelineRow]:
    """Runs the contestants one after the other.

    Raises:
        CordaError: one of them failed; PEFT's own needs the package attrs.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [_in_child(name, task, Path(folder)) for name in names]
        caches = [Path(folder) / f"{name}.pt" for name in ("peft", "patch_peft")]
        if task.mode == "ipm" and all(cache.exists() for cache in caches):
            overlap = _overlap(*map(torch.load, caches))
            rows = [
                replace(row, overlap=overlap, passed=overlap >= _SAME_SUBSPACE)
                if row.name == "patch_peft"
                else row
                for row in rows
            ]
    return rows


def _overlap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Median over the layers of the smallest cosine between two caches' subspaces."""
    cosines = [
        torch.linalg.svdvals(U.double().mT @ other[key].double()).min()
        for key, U in one.items()
        if key.endswith("U_WC")
    ]
    return float(torch.stack(cosines).median())


def _in_child(name: str, task: Task, folder: Path) -> PipelineRow:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(name, task, folder, sender))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = f"it ended without a word (exit status {child.exitcode})"
    child.join()
    if isinstance(result, str):
        raise CordaError(f"the run of {name} failed: {result}")
    row: PipelineRow = result
    return row


def _report(name: str, task: Task, folder: Path, sender: Any) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what is measured is no adapter that anyone trains
    try:
        sender.send(run(name, task, folder))
    except Exception as error:  # whatever it is, the parent has to hear of it
        sender.send(f"{type(error).__name__}: {error}")


def run(name: str, task: Task, folder: Path) -> PipelineRow:
    """Runs one contestant in this process; those of PEFT's form leave a cache in `folder`."""
    from corda_kernels.models import decoder, load_model

    model = load_model(task.model)
    runner = decoder(model) if name == "init_corda" else model

    @torch.no_grad()
    def forward() -> None:
        for ids in task.batches:
            runner(input_ids=ids, use_cache=False)

    runner(input_ids=task.batches[0], use_cache=False)  # the first call prepares things
    _forget_peak()
    bare = _timed(forward)
    before = peak_bytes() or 0
    seconds = _timed(_contestant(name, model, task, forward, folder))
    return PipelineRow(name, seconds, bare, max(0, (peak_bytes() or 0) - before))


def _contestant(
    name: str, model: nn.Module, task: Task, forward: Callable[[], None], folder: Path
) -> Callable[[], object]:
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig as PeftCordaConfig

    from corda_kernels.integrations.peft import preprocess_corda
    from corda_kernels.models import target_linears
    from corda_kernels.pipeline import CordaConfig, init_corda

    lora = LoraConfig(
        r=task.rank,
        target_modules=list(target_linears(model)),
        init_lora_weights="corda",
        corda_config=PeftCordaConfig(corda_method=task.mode, cache_file=str(folder / f"{name}.pt")),
    )
    if name == "peft":
        from peft.tuners.lora.corda import preprocess_corda as peft_own

        return lambda: peft_own(model, lora, forward)
    if name == "patch_peft":
        return lambda: preprocess_corda(model, lora, forward, normalize="peft", damping=0.01)
    config = CordaConfig(task.mode, rank=task.rank, stability=False, progress=False)
    return lambda: init_corda(model, task.batches, config)


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _forget_peak() -> None:
    """Makes the peak what is in use now; loading the model may have taken more for a moment."""
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
