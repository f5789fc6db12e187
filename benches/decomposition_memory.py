"""Peak memory of the decomposition beyond its inputs, for the cases of `svd_cases.py`.

On a CPU it is the high-water mark of a process of its own for each end (Linux). The list "memory"
of a results file is replaced by what is found.

    python benches/decomposition_memory.py CASES [--model M --cov C] [--rank N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from svd import ours
from svd_cases import CASES, ENDS, Case, make_case

from corda_kernels.files import write_json
from corda_kernels.linalg import End
from corda_kernels.memory import can_forget_peak, forget_peak, peak_bytes, used_bytes

Source = tuple[str, str]  # a model and its covariances, of the case "model"


def bound(case: Case, groups: int) -> int:
    """Bytes of three float64 copies of what is worked on at a time: the `groups` largest of the
    covariances, each with the layers that share it."""
    sizes = Counter({id(C): C.numel() for C in case.covariances.values()})
    for name, weight in case.weights.items():
        sizes[id(case.covariances[name])] += weight.numel()
    return 3 * 8 * sum(size for _, size in sizes.most_common(groups))


def growth(case: Case, which: End, device: torch.device) -> int:
    gc.collect()
    forget_peak(device)
    before = used_bytes(device)
    ours(case, [which])
    return peak_bytes(device) - before


@torch.no_grad()
def print_growth(name: str, which: End, rank: int, source: Source | None) -> None:
    """Prints the bytes by which this process grows."""
    cpu = torch.device("cpu")
    # Libraries take memory of their own at their first call.
    ours(make_case("smollm2-block", cpu, 8), [which])
    print(growth(make_case(name, cpu, rank, source), which, cpu))


def measured(
    case: Case, device: torch.device, source: Source | None = None
) -> Iterator[dict[str, Any]]:
    """The growth at both ends, and on a CPU its bound; on a GPU batches are as large as
    `memory_limit` allows. Nothing where the system does not tell it."""
    for which in ENDS:
        found = {"case": case.name, "which": which}
        if device.type == "cuda":
            yield found | {"grown": growth(case, which, device), "bound": None}
        elif can_forget_peak():
            name = case.name if case.name in CASES else "model"
            ran = subprocess.run(
                [sys.executable, __file__, "--of", json.dumps([name, which, case.rank, source])],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                # What glibc keeps of freed memory would hide growth: larger pieces go back.
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
            )
            # Groups of small layers run side by side, a single layer is its own group.
            limit = bound(case, torch.get_num_threads())
            yield found | {"grown": int(ran.stdout.split()[-1]), "bound": limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--cov")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--of", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.of:
        print_growth(*given.of)
        return
    source, device = (given.model, given.cov) if given.model else None, torch.device(given.device)
    memory = []
    for name in given.cases.split(","):
        for found in measured(make_case(name, device, given.rank, source), device, source):
            memory.append(found)
            limit = "" if found["bound"] is None else f", bound {found['bound'] / 2**20:.0f}"
            print(f"{found['case']} {found['which']}: {found['grown'] / 2**20:.0f} MiB{limit}")
    if given.json:
        write_json(given.json, json.loads(given.json.read_text()) | {"memory": memory})


if __name__ == "__main__":
    main()
