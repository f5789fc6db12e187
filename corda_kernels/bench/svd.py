"""CO-SVD at both ends against the published procedure and what else torch offers; its memory.

The latter, on a CPU, is the high-water mark of a process of its own, which runs this file.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from corda_kernels.bench.accuracy import Reference, adapter_error, reference, tail_energy_ratio
from corda_kernels.bench.svd_cases import CASES, DAMPING, Case, make_case
from corda_kernels.bench.svd_methods import ENDS, End, Method, Part, Parts, ours
from corda_kernels.bench.timing import Timing, measure
from corda_kernels.errors import ConfigError
from corda_kernels.linalg import parallel_map
from corda_kernels.memory import can_forget_peak, forget_peak, peak_bytes, used_bytes

# Up to this many rows or columns a float64 reference takes a second or less.
_QUICK = 2048
BASELINE = "published"

HEADER = (
    f"{'case':<13} {'layers':>6} {'r':>4} {'end':<8} {'method':<11} {'p50 s':>9} "
    f"{'× published':>11} {'error':>11}"
)


@dataclass(frozen=True)
class Row:
    """One method at one end of one case.

    Attributes:
        case: its name.
        layers: how many there are.
        rank: number of components.
        which: the end.
        method: "published" is the baseline.
        error: the largest over the sampled layers: of B A relative to the reference's for the
            largest components, `tail_energy_ratio` for the smallest; None without a reference.
        passed: whether the error is small enough; the baseline is timed in any case.
        timing: seconds for all layers, both ends at once where the method yields both.
        speedup: baseline's median over this one's.
    """

    case: str
    layers: int
    rank: int
    which: End
    method: str
    error: float | None
    passed: bool
    timing: Timing | None = None
    speedup: float | None = None

    def line(self) -> str:
        """As printed below HEADER."""
        error = "not checked"
        if self.error is not None:
            # An energy of 1.0001 times the least possible is 1e-4 too much.
            largest = self.which == "largest"
            error = f"{self.error:.1e}" if largest else f"1 + {self.error - 1:.1e}"
        seconds = "" if self.timing is None else f"{self.timing.p50:.3f}"
        speedup = "" if self.speedup is None else f"{self.speedup:.2f}"
        return (
            f"{self.case:<13} {self.layers:>6} {self.rank:>4} {self.which:<8} {self.method:<11} "
            f"{seconds:>9} {speedup if seconds else 'no speed':>11} {error:>11}"
            f"{'' if self.passed else ' wrong'}"
        )


@torch.no_grad()
def bench_case(
    case: Case, contestants: Mapping[str, Method], *, exact: bool = False
) -> Iterator[Row]:
    """Yields the rows of the methods, the baseline's first if it is there.

    Each is warmed up on a small layer, and runs at least once.

    Args:
        case: see `make_case`.
        contestants: methods by name, the baseline first.
        exact: compare layers past 2048 channels with a float64 SVD, too, which takes minutes.

    Raises:
        ConfigError: a layer is too small for the rank.
    """
    device = next(iter(case.weights.values())).device
    for layer, weight in case.weights.items():
        if case.rank > min(weight.shape):
            raise ConfigError(
                f"rank {case.rank} is not possible for layer {layer} of {case.name} "
                f"({weight.shape[0]} × {weight.shape[1]}): choose a smaller --rank"
            )
    # First, so that nothing but what is timed runs in between.
    truths = references(case) if exact or _largest(case) <= _QUICK else {}
    warm_up = make_case("smollm2-block", device, 8)
    base: float | None = None
    for name, method in contestants.items():
        method.run(warm_up, method.ends)
        for ends in [method.ends] if method.at_once else [(which,) for which in method.ends]:
            found: Parts = {}

            def run(ends: tuple[End, ...], found: Parts = found) -> None:
                found |= method.run(case, ends)  # noqa: B023 (runs before the next round)

            timing = measure(run, [ends], device, repeats=1, warm_up=0)
            base = timing.p50 if name == BASELINE else base
            for which in ends:
                error = end_error(found[which], truths, which) if truths else None
                passed = error is None or error <= method.allowed[which]
                facts = (case.name, len(case.weights), case.rank, which, name, error, passed)
                if passed or name == BASELINE:
                    yield Row(*facts, timing, base / timing.p50 if base else None)
                else:
                    yield Row(*facts)


def _largest(case: Case) -> int:
    return max(max(weight.shape) for weight in case.weights.values())


def references(case: Case) -> dict[str, Reference]:
    """The sampled layers of a case, in float64, on the CPU."""

    def one(name: str) -> Reference:
        return reference(case.weights[name].cpu(), case.covariances[name].cpu(), DAMPING)

    several = parallel_map if _largest(case) <= _QUICK else map
    return dict(zip(case.sampled, several(one, case.sampled), strict=True))


def end_error(parts: dict[str, Part], truths: dict[str, Reference], which: End) -> float:
    """The largest error of one end over the layers in `truths`; see `Row.error`."""
    errors = []
    for name, truth in truths.items():
        U, A = parts[name].U.cpu().double(), parts[name].A
        if which == "smallest":
            errors.append(tail_energy_ratio(U, truth))
        else:
            BA = U @ (U.mT @ truth.W if A is None else A.cpu().double())
            errors.append(adapter_error(BA, truth, which, U.shape[-1]))
    return max(errors)


@dataclass(frozen=True)
class Growth:
    """Peak memory beyond the inputs, in bytes.

    Attributes:
        case: its name.
        which: the end.
        grown: measured.
        bound: of three float64 copies of what is worked on at a time; None on a GPU, where batches
            are as large as `memory_limit` allows.
    """

    case: str
    which: End
    grown: int
    bound: int | None

    def line(self) -> str:
        """As printed."""
        text = f"{self.case} {self.which}: peak memory {self.grown / 2**20:.0f} MiB over the inputs"
        if self.bound is None:
            return text
        verdict = "below" if self.grown < self.bound else "ABOVE"
        return f"{text}, {verdict} three float64 copies, {self.bound / 2**20:.0f} MiB"


def bench_memory(
    case: Case, device: torch.device, source: tuple[str, str] | None = None
) -> Iterator[Growth]:
    """Yields the growth of `ours` at both ends; nothing where the system does not tell it."""
    for which in ENDS:
        if device.type == "cuda":
            yield Growth(case.name, which, _growth(case, which, device), None)
        elif can_forget_peak():
            name = case.name if case.name in CASES else "model"
            arguments = json.dumps([name, which, case.rank, source])
            ran = subprocess.run(
                [sys.executable, "-m", "corda_kernels.bench.svd", arguments],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                # What glibc keeps of freed memory would hide growth: larger pieces go back.
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
            )
            # Groups of small layers run side by side, a single layer is its own group.
            bound = case.memory_bound(torch.get_num_threads())
            yield Growth(case.name, which, int(ran.stdout.split()[-1]), bound)


def _growth(case: Case, which: End, device: torch.device) -> int:
    gc.collect()
    forget_peak(device)
    before = used_bytes(device)
    ours(case, [which])
    return peak_bytes(device) - before


@torch.no_grad()
def print_growth(name: str, which: End, rank: int, source: tuple[str, str] | None) -> None:
    """Prints the bytes by which this process grows."""
    cpu = torch.device("cpu")
    # Libraries take memory of their own at their first call.
    ours(make_case("smollm2-block", cpu, 8), [which])
    print(_growth(make_case(name, cpu, rank, source), which, cpu))


if __name__ == "__main__":
    print_growth(*json.loads(sys.argv[1]))
