"""What the penalties add to a training step of a model.

    python benches/penalty_time.py MODEL [--json OUT]

The tokens are random, on which time does not depend. A penalty's time is that of its value and of
its gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from corda_kernels import (
    CompactnessPenalty,
    CordaConfig,
    DriftPenalty,
    calibrate,
    init_corda,
    load_model,
)
from corda_kernels.bench.timing import environment
from corda_kernels.files import write_json


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model: Any = load_model(arguments.model, dtype="float32")
    ids = torch.randint(3, model.config.vocab_size, (arguments.batch, arguments.length))
    covariances = calibrate(model, [ids], progress=False)
    config = CordaConfig("kpm", rank=arguments.rank, stability=False, progress=False)
    model = init_corda(model, covariances, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    result: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    result["step"] = seconds(step, 3)
    print(", ".join(f"{key} {value}" for key, value in result["environment"].items()))
    print(
        f"{arguments.model.name}, {len(covariances)} layers, rank {arguments.rank}; a step of "
        f"{arguments.batch} x {arguments.length} tokens takes {result['step']:.2f} s"
    )
    for kind in (DriftPenalty, CompactnessPenalty):
        started = time.perf_counter()
        penalty = kind(model, covariances)
        made = time.perf_counter() - started
        found = seconds(lambda penalty=penalty: penalty().backward(), 5)
        result[kind.__name__] = {"made": made, "seconds": found, "share": found / result["step"]}
        print(
            f"{kind.__name__:18} {1e3 * found:6.0f} ms, {found / result['step']:.1%} of the step; "
            f"made once in {made:.1f} s"
        )
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
