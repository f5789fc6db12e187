"""What `co_svd_layers` takes of memory beyond its inputs, at the most.

On a CPU that is the high-water mark of a process of its own, which this file is:

    python -m corda_kernels.bench.svd_memory CASE END [--rank R] [--model MODEL --cov FILE]
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from corda_kernels.bench.svd_cases import CASES, Case, make_case
from corda_kernels.bench.svd_methods import ENDS, End, methods
from corda_kernels.memory import can_forget_peak, forget_peak, peak_bytes, used_bytes


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

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    def line(self) -> str:
        """As printed."""
        text = f"{self.case} {self.which}: peak memory {self.grown / 2**20:.0f} MiB over the inputs"
        if self.bound is None:
            return text
        verdict = "below" if self.grown < self.bound else "ABOVE"
        return f"{text}, {verdict} three float64 copies, {self.bound / 2**20:.0f} MiB"


def bench_memory(
    case: Case, device: torch.device, model: str | None = None, cov: str | None = None
) -> Iterator[Growth]:
    """Yields the growth at both ends; nothing where the system does not tell it."""
    for which in ENDS:
        if device.type == "cuda":
            yield Growth(case.name, which, _on_cuda(case, which), None)
        elif can_forget_peak():
            # Groups of small layers run side by side, a single layer is its own group.
            bound = case.memory_bound(torch.get_num_threads())
            yield Growth(case.name, which, _in_child(case, which, model, cov), bound)


def _in_child(case: Case, which: End, model: str | None, cov: str | None) -> int:
    name = "model" if case.name not in CASES else case.name
    command = [sys.executable, "-m", "corda_kernels.bench.svd_memory", name, which]
    for option, value in (("--rank", case.rank), ("--model", model), ("--cov", cov)):
        command += [] if value is None else [option, str(value)]
    # What glibc keeps of freed memory would hide growth: larger pieces go back to the system.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(ran.stdout.split()[-1])


def _on_cuda(case: Case, which: End) -> int:
    device = torch.device("cuda")
    run = methods(device)["ours"].run
    forget_peak(device)
    before = used_bytes(device)
    run(case, [which])
    return peak_bytes(device) - before


def main(arguments: list[str] | None = None) -> None:
    """Prints the bytes by which this process grows."""
    parser = argparse.ArgumentParser(prog="python -m corda_kernels.bench.svd_memory")
    parser.add_argument("case")
    parser.add_argument("which", choices=ENDS)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--model")
    parser.add_argument("--cov")
    options = parser.parse_args(arguments)
    cpu = torch.device("cpu")
    run = methods(cpu)["ours"].run
    with torch.no_grad():
        # Libraries take memory of their own at their first call.
        run(make_case("smollm2-block", cpu, 8), [options.which])
        case = make_case(options.case, cpu, options.rank, options.model, options.cov)
        gc.collect()
        forget_peak()
        before = used_bytes()
        run(case, [options.which])
        print(peak_bytes() - before)


if __name__ == "__main__":
    main()
