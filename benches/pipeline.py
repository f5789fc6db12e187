"""The whole initialisation against PEFT's own: the same model, tokens, layers and rank.

    python benches/pipeline.py MODEL --rounds 2 --only peft,patch_peft,init_corda --json OUT

init_corda and the patched PEFT against PEFT's CorDA, PiSSA and EVA, with memory. The text is
Python's own help topics, or --data FILE. PEFT takes one sequence at a time. Every contestant runs
in a process of its own, so that none finds memory or caches that another has left.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipeline_methods import METHODS, Stages, Subject, Task, larger_batches
from torch import Tensor, nn
from transformers.utils import logging

from corda_kernels.arguments import whole_number
from corda_kernels.bench.timing import environment
from corda_kernels.cli.options import torch_device
from corda_kernels.errors import ConfigError, CordaError
from corda_kernels.files import write_json
from corda_kernels.memory import forget_peak, peak_bytes
from corda_kernels.models import load_model, load_tokenizer
from corda_kernels.outputs import check_output
from corda_kernels.sources import help_topics
from corda_kernels.structure import decoder
from corda_kernels.text import token_batches

CONTESTANTS = tuple(METHODS)

# Of a row, in the order in which they run.
STAGES = ("forward", "covariance", "decomposition", "attaching")

# Contestants that compute no logits, unless the model looks at them itself (as Gemma 2 does).
_WITHOUT_LOGITS = ("init_corda",)

# Least overlap (smallest cosine between subspaces, median over the layers) at which the same was
# computed. For the smallest components PEFT's float32 leaves no such agreement to test.
_SAME_SUBSPACE = 0.999


@dataclass(frozen=True)
class PipelineRow:
    """One contestant's run.

    Attributes:
        name: of the contestant.
        seconds: of the whole initialisation, from tokens to an adapted model.
        forward: seconds of the forward passes that it makes, timed by themselves: without the
            output head where no logits are computed, and in its own batches.
        bare: seconds of as many as a script of PEFT runs them, the whole model and one sequence at
            a time, timed in the same process; of several runs the median by itself, for it is
            the same work in all of them.
        growth: bytes by which the peak of memory, of the process or on a GPU of the allocator, rose
            over that of the loaded model and this bare pass.
        stages: seconds of each of STAGES that it has; together they are `seconds`.
        overlap: median over the layers of the smallest cosine between its subspaces and PEFT's;
            None where it was not compared. init_corda's covariances are normalised in another way,
            and PiSSA and EVA compute something else.
        passed: whether it computed what PEFT did, as far as it was compared.
        runs: seconds of every run; all else but the growth and the bare pass is of the one in the
            middle.
        growths: of every run, of which `growth` is the median.
    """

    name: str
    seconds: float
    forward: float
    bare: float
    growth: int
    stages: dict[str, float] = field(default_factory=dict)
    overlap: float | None = None
    passed: bool = True
    runs: tuple[float, ...] = ()
    growths: tuple[int, ...] = ()

    @property
    def beyond(self) -> float:
        """Seconds beyond the bare forward passes."""
        return self.seconds - self.bare

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"beyond": self.beyond}


def bench_pipeline(
    task: Task, names: Collection[str] = CONTESTANTS, rounds: int = 1
) -> Iterator[PipelineRow]:
    """Runs the contestants one after the other, PEFT's own first, and yields their rows.

    Args:
        task: what to initialise.
        names: of the contestants.
        rounds: how often all of them run, in turn, so that what disturbs the machine for a while
            does not meet one of them alone. Rows come with the last round.

    Raises:
        CordaError: one of them failed; PEFT's own needs the package attrs.
    """
    chosen = [name for name in CONTESTANTS if name in names]
    found: dict[str, list[PipelineRow]] = {name: [] for name in chosen}
    for number in range(rounds):
        # Of every round its own, for a cache that is there already spares all work.
        with tempfile.TemporaryDirectory() as folder:
            for name in chosen:
                row = _in_child(name, task, Path(folder))
                found[name].append(_compared(row, task, Path(folder)))
                if number == rounds - 1:
                    yield _in_the_middle(found[name])


def _compared(row: PipelineRow, task: Task, folder: Path) -> PipelineRow:
    """The row with its overlap with PEFT's cache, where both have left one."""
    theirs, ours = (folder / f"{name}.pt" for name in ("peft", row.name))
    if row.name == "peft" or task.mode != "ipm" or not (ours.exists() and theirs.exists()):
        return row
    overlap = _overlap(*(torch.load(cache, weights_only=True) for cache in (theirs, ours)))
    return replace(row, overlap=overlap, passed=overlap >= _SAME_SUBSPACE)


def _in_the_middle(rows: list[PipelineRow]) -> PipelineRow:
    """The run of median length, of an even number the longer of two; wrong if any was."""
    ordered = sorted(rows, key=lambda row: row.seconds)
    passed = all(row.passed for row in rows)
    middle = ordered[len(ordered) // 2]
    growths = tuple(row.growth for row in rows)
    return replace(
        middle,
        passed=passed,
        runs=tuple(row.seconds for row in rows),
        bare=statistics.median(row.bare for row in rows),
        # By itself, for how a heap falls to pieces has nothing to do with the time.
        growth=statistics.median_high(growths),
        growths=growths,
    )


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
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what is measured is no adapter that anyone trains
    try:
        sender.send(run(name, task, folder))
    except Exception as error:  # whatever it is, the parent has to hear of it
        sender.send(f"{type(error).__name__}: {error}")


def run(name: str, task: Task, folder: Path) -> PipelineRow:
    """Runs one contestant in this process; those of PEFT's form leave a cache in `folder`."""
    device = task.device
    model = load_model(task.model, device=device)
    task = replace(task, batches=[ids.to(device) for ids in task.batches])
    own = replace(task, batches=larger_batches(task.batches)) if name == "init_corda" else task

    @torch.no_grad()
    def forward(runner: nn.Module, batches: list[Tensor]) -> None:
        for ids in batches:
            runner(input_ids=ids, use_cache=False)

    as_given = partial(forward, model, task.batches)
    forward(model, task.batches[:1])  # the first call prepares things
    # In this order for all, for the first pass over all sequences takes longer than a second.
    bare = passes = _timed(as_given, device)
    if name in _WITHOUT_LOGITS:
        passes = _timed(partial(forward, decoder(model), own.batches), device)
    forget_peak(device)
    forward(model, task.batches[:1])
    before = peak_bytes(device)
    stages = Stages(len(own.batches), [device])
    METHODS[name](Subject(own, model, as_given, folder), stages)
    growth = max(0, peak_bytes(device) - before)
    repeated = stages.passes / len(own.batches)
    seconds = by_stage(stages.seconds, passes * repeated)
    total = sum(seconds.values())
    return PipelineRow(name, total, passes * repeated, bare * repeated, growth, seconds)


def by_stage(clocked: dict[str, float], forward: float) -> dict[str, float]:
    """Seconds of STAGES from those that were clocked, the forward passes taken out of them."""
    found = dict(clocked)
    if forward:
        found["forward"] = forward
        if "calibration" in found:
            found["covariance"] = found.pop("calibration") - forward
        else:
            found["decomposition"] -= forward
    return {stage: found[stage] for stage in STAGES if stage in found}


def _timed(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


HEADER = (
    f"{'':<11} {'seconds':>9} {' '.join(f'{stage:>13}' for stage in STAGES)} {'beyond':>9} "
    f"{'growth':>10} {'× PEFT':>8} {'beyond':>8} {'growth':>8} {'overlap':>9}"
)


def line(row: PipelineRow, peft: PipelineRow | None) -> str:
    """A row as printed below HEADER, with its ratios to PEFT's if that has run."""
    if not row.passed:
        return f"{row.name} computes something else (overlap {row.overlap:.4f}): no speed"
    stages = " ".join(
        f"{row.stages[stage]:>13.1f}" if stage in row.stages else " " * 13 for stage in STAGES
    )
    ratios = ""
    if peft is not None:
        beyond = f"{peft.beyond / row.beyond:.2f}" if row.beyond > 0 else "–"
        ratios = (
            f"{peft.seconds / row.seconds:>8.2f} {beyond:>8} "
            f"{row.growth / peft.growth if peft.growth else 0:>8.2f}"
        )
    overlap = "" if row.overlap is None else f"{row.overlap:.6f}"
    return (
        f"{row.name:<11} {row.seconds:>9.1f} {stages} {row.beyond:>9.1f} "
        f"{row.growth / 2**20:>6.0f} MiB {ratios:>26} {overlap:>9}"
    )


def sequences(model: str, data: Path | None, samples: int, seq_len: int) -> list[Tensor]:
    """Token ids (1, seq_len) each."""
    with tempfile.TemporaryDirectory() as folder:
        text = data or help_topics(Path(folder) / "python-help.txt")
        batches = token_batches(text, load_tokenizer(model), samples=samples, seq_len=seq_len)
    return [batch["input_ids"] for batch in batches]


def compare(given: argparse.Namespace) -> None:
    """Prints the table, and writes the file after every row."""
    if given.json is not None:
        check_output(given.json)
    names = CONTESTANTS if given.only is None else tuple(map(str.strip, given.only.split(",")))
    if not set(names) <= set(CONTESTANTS):
        raise ConfigError(f"--only must be of {', '.join(CONTESTANTS)}, got {given.only!r}")
    whole_number("--rank", given.rank, 1)
    whole_number("--rounds", given.rounds, 1)
    device = torch_device(given.device)
    described = environment(device)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    batches = sequences(given.model, given.data, given.samples, given.seq_len)
    tokens = sum(ids.numel() for ids in batches)
    print(
        f"{given.model}, {given.mode}, rank {given.rank}, {len(batches)} sequences, {tokens} tokens"
    )
    print(HEADER, flush=True)
    about = {"model": Path(given.model).name, "mode": given.mode, "rank": given.rank}
    rows: list[dict[str, Any]] = []
    results = {"environment": described, "task": about | {"tokens": tokens}, "pipeline": rows}
    peft: PipelineRow | None = None
    task = Task(given.model, batches, given.mode, given.rank, device)
    for row in bench_pipeline(task, names, given.rounds):
        peft = row if row.name == "peft" else peft
        print(line(row, peft), flush=True)
        rows.append(row.to_json())
        if given.json is not None:
            write_json(given.json, results)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, a hub id or a GGUF file")
    parser.add_argument("--data", type=Path, help="calibration text: a text file or JSON lines")
    parser.add_argument("--samples", type=int, default=16, help="number of sequences")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each")
    parser.add_argument("--rank", type=int, default=32, help="components of each layer")
    parser.add_argument("--mode", choices=("ipm", "kpm"), default="ipm")
    parser.add_argument("--only", help=f"contestants by commas: {', '.join(CONTESTANTS)}")
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of each, in turn; the one in the middle counts"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="a file for all results")
    try:
        compare(parser.parse_args(arguments))
    except CordaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
