"""What the penalties add to a training step of a model.

    python benches/penalty_time.py MODEL [--json OUT]

The tokens are random, on which time does not depend. A penalty's time is that of its value and of
its gradient.
"""

from __future__ import annotations

import argparse
import time
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
from corda_kernels.bench.timing import environment, measure
from corda_kernels.files import write_json


def added(arguments: argparse.Namespace, kind: Any, residual: Any) -> dict[str, float]:
    """A penalty on an adapter of the form that it is made for."""
    torch.manual_seed(0)
    model: Any = load_model(arguments.model, dtype="float32")
    ids = torch.randint(3, model.config.vocab_size, (arguments.batch, arguments.length))
    covariances = calibrate(model, [ids], progress=False)
    rank = arguments.rank // 2 if residual is None else arguments.rank
    config = CordaConfig("kpm", rank=rank, residual=residual, stability=False, progress=False)
    model = init_corda(model, covariances, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(_: None) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    cpu = torch.device("cpu")
    taken = measure(step, [None], cpu, repeats=3, warm_up=1).p50
    started = time.perf_counter()
    penalty = kind(model, covariances)
    made = time.perf_counter() - started
    found = measure(lambda _: penalty().backward(), [None], cpu, warm_up=1).p50
    return {"step": taken, "made": made, "seconds": found, "share": found / taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA that is trained")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    result: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    print(", ".join(f"{key} {value}" for key, value in result["environment"].items()))
    for kind, residual in ((DriftPenalty, None), (CompactnessPenalty, "weight")):
        found = added(arguments, kind, residual)
        result[kind.__name__] = found
        print(
            f"{kind.__name__:18} {1e3 * found['seconds']:6.0f} ms, {found['share']:.1%} of a step "
            f"of {found['step']:.2f} s; made once in {found['made']:.1f} s"
        )
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
