"""The first step, and the cost of a step, of the forms in which one adapter can be trained.

    python benches/adapter_forms.py first MODEL DATA OUT
    python benches/adapter_forms.py cost MODEL OUT

`first` compares what one step of an optimiser adds to the weights by the pair and by the plain LoRA
that starts from the same A0 and B0. DATA is the folder that `benches/finetune.py` describes; what
training itself does to the forms is its profile "forms".

`cost` times steps of LoRA at the number of components and at twice that, of the pair and of the
plain LoRA, in turn, each in a process of its own, of which it takes the peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from finetuning.data import training_batches
from finetuning.experiment import Experiment
from finetuning.forms import Component, attach, changes, components
from finetuning.likelihood import answer_nll
from finetuning.profiles import PROFILES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corda_kernels import load_model
from corda_kernels.bench.timing import environment, measure
from corda_kernels.files import write_json
from corda_kernels.linears import linear_shape
from corda_kernels.memory import peak_bytes
from corda_kernels.targets import target_linears

PROFILE = PROFILES["forms"]
# Small, so that what is of second order is; not so small that the pair's own rounding shows.
RATES: dict[Any, float] = {torch.optim.Adam: 1e-5, torch.optim.SGD: 0.1}
ROUNDS, STEPS = 3, 5
SEQUENCES, TOKENS = 4, 128


def first(model: str, data: Path, out: Path) -> None:
    """Relative differences of the first step's ΔW, by mode and optimiser."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(model, data, Path(folder), "forms", PROFILE, None)
        (batch,) = training_batches(
            experiment.training_problems, steps=1, size=PROFILE.batch_size, seed=0
        )
        for mode in ("ipm", "kpm"):
            covariances = experiment.covariances(mode, False)
            parts = components(load_base(model), covariances, mode, PROFILE.rank)
            for optimiser, rate in RATES.items():
                found = {}
                for form in ("pair", "plain"):
                    adapted = attach(load_base(model), parts, form)
                    steps = optimiser(trained(adapted), lr=rate)
                    answer_nll(adapted, batch).mean().backward()
                    steps.step()
                    found[form] = changes(adapted, parts)
                squares = [
                    (
                        float((found["plain"][name] - pair).square().sum()),
                        float(pair.square().sum()),
                    )
                    for name, pair in found["pair"].items()
                ]
                errors = [(error / size) ** 0.5 for error, size in squares]
                error, size = map(sum, zip(*squares, strict=True))
                rows.append(
                    {
                        "mode": mode,
                        "optimiser": optimiser.__name__,
                        "learning_rate": rate,
                        "all": (error / size) ** 0.5,
                        "median": statistics.median(errors),
                        "worst": max(errors),
                    }
                )
                print(rows[-1], flush=True)
    write_json(out, {"rows": rows, "environment": environment(torch.device("cpu"))})


def load_base(model: str) -> nn.Module:
    return load_model(model, dtype="float32")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _lora(rank: int) -> Callable[[nn.Module], nn.Module]:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return lambda base: get_peft_model(base, config)


def _form(form: Any) -> Callable[[nn.Module], nn.Module]:
    """A form with components at random, on which no time depends."""

    def make(base: nn.Module) -> nn.Module:
        parts = {}
        for name, module in target_linears(base).items():
            outputs, inputs = linear_shape(module)
            U = torch.linalg.qr(torch.randn(outputs, PROFILE.rank)).Q
            parts[name] = Component(U, torch.randn(PROFILE.rank, inputs))
        return attach(base, parts, form)

    return make


COSTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LoRA, rank r": _lora(PROFILE.rank),
    "LoRA, rank 2r": _lora(2 * PROFILE.rank),
    "pair, r components": _form("pair"),
    "plain form, r components": _form("plain"),
}


def cost(model: str, out: Path) -> None:
    """Seconds of a step and peak memory, the median over rounds in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in COSTS}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "one.json"))
        for _ in range(ROUNDS):
            for name in COSTS:
                command = [sys.executable, __file__, "one", model, file, "--form", name]
                subprocess.run(command, check=True)
                found[name].append(json.loads(Path(file).read_text()))
                print(name, found[name][-1], flush=True)
    rows = [
        {
            "form": name,
            "seconds": statistics.median(each["seconds"] for each in runs),
            "runs": [each["seconds"] for each in runs],
            "peak_bytes": statistics.median(each["peak_bytes"] for each in runs),
            "trained": runs[0]["trained"],
        }
        for name, runs in found.items()
    ]
    shape = {"rank": PROFILE.rank, "sequences": SEQUENCES, "tokens": TOKENS}
    machine = environment(torch.device("cpu"))
    write_json(out, {"rows": rows, "model": Path(model).name, **shape, "environment": machine})


def one(model: str, form: str, out: Path) -> None:
    """One process of `cost`: the median of some steps of AdamW after a first one."""
    torch.manual_seed(0)
    adapted: Any = COSTS[form](load_base(model))
    optimizer = torch.optim.AdamW(trained(adapted), lr=1e-4)

    def step(ids: Tensor) -> None:
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = list(torch.randint(100, 1000, (STEPS + 1, SEQUENCES, TOKENS)))
    timing = measure(step, batches, torch.device("cpu"), repeats=STEPS, warm_up=1)
    write_json(
        out,
        {
            "seconds": timing.p50,
            "peak_bytes": peak_bytes(),
            "trained": sum(each.numel() for each in trained(adapted)),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("first", "cost", "one"):
        command = commands.add_parser(name)
        command.add_argument("model")
        if name == "first":
            command.add_argument("data", type=Path)
        command.add_argument("out", type=Path)
        if name == "one":
            command.add_argument("--form", choices=COSTS, required=True)
    given = parser.parse_args()
    if given.command == "first":
        first(given.model, given.data, given.out)
    elif given.command == "cost":
        cost(given.model, given.out)
    else:
        one(given.model, given.form, given.out)


if __name__ == "__main__":
    main()
