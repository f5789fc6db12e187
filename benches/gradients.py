"""Gradients on a real model: what gathering costs, what starts capture, what D says of the KL.

    python benches/gradients.py MODEL TASK KNOWLEDGE [--json OUT] [--only time,divergence,accuracy]

TASK is a file of GSM8K, KNOWLEDGE one of NQ Open, see `benches/finetune.py`.

time: a pass that takes gradients over a forward pass without its head, and over that and the
products (of one 1,024-token batch; C alone, then C, D and Ḡ).
accuracy: energy that task starts and two-sided components hold, over the most (for the smallest
components: the least) that any of the same rank do, and the largest angle between their rows and
the best ones where the singular values have a gap of 1 %; the best by a dense float64 eigenproblem.
divergence: of random changes ΔW of one relative size, ½ Σ tr(D ΔW C ΔWᵀ) beside the measured mean
KL divergence from the base on other text of the kind, and the rank correlation of both. Either each
changes a layer of its own, or all layers by a random matrix of rank 1. Beside it without D.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from corda_kernels import CovarianceSet, calibrate, co_svd, load_model, load_tokenizer
from corda_kernels.bench.timing import environment
from corda_kernels.calibration.forward import evaluating
from corda_kernels.calibration.run import CalibrationRun
from corda_kernels.files import write_json
from corda_kernels.linalg import steepest_rows
from corda_kernels.linears import linear_weight
from corda_kernels.text import token_batches

TEMPLATES = {
    "task": "Question: {question}\nAnswer: {answer}",
    "knowledge": "Q: {question}\nA: {answer[0]}",
}
DAMPING = 0.01
LEAST_GAP = 0.01


def text(arguments: argparse.Namespace, kind: str, samples: int, seed: int) -> list[Any]:
    return token_batches(
        getattr(arguments, kind),
        load_tokenizer(arguments.model),
        template=TEMPLATES[kind],
        samples=samples,
        seq_len=256,
        batch_size=4,
        seed=seed,
    )


def times(model: Any, batches: list[Any], rounds: int) -> dict[str, float]:
    """Medians of CPU seconds, in turns, and ratios."""

    def forward() -> None:
        run = CalibrationRun(model, progress=False)
        with evaluating(model):
            for inputs, _ in run.together(run.forward.pieces(batches[0], 0, (0, 0))):
                run.forward(inputs)

    ways: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "inputs": lambda: calibrate(model, batches[:1], progress=False),
        "both": lambda: calibrate(model, batches[:1], progress=False, sides="both"),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            found[name].append(time.process_time() - started)
    seconds = {name: statistics.median(taken[1:]) for name, taken in found.items()}
    products = seconds["products"] = product_seconds(model, batches[0]["input_ids"].numel())
    seconds["passes over forward"] = (seconds["both"] - products) / seconds["forward"]
    print(", ".join(f"{name} {value:.2f}" for name, value in seconds.items()), flush=True)
    return seconds


def product_seconds(model: Any, tokens: int) -> float:
    """CPU seconds of the products that one batch adds to C, D and Ḡ, alone."""
    from corda_kernels.kernels import syrk_
    from corda_kernels.linears import linear_shape
    from corda_kernels.targets import target_linears

    shapes = [linear_shape(module) for module in target_linears(model).values()]
    x = {size: torch.randn(tokens, size) for shape in shapes for size in shape}
    taken = 0.0
    for out, channels in shapes:
        D, mean = torch.zeros(out, out), torch.zeros(out, channels)
        started = time.process_time()
        syrk_(D, x[out])
        mean.addmm_(x[out].mT, x[channels])
        taken += time.process_time() - started
    for channels in [576, 576, 576, 1536] * 30 if len(shapes) == 210 else []:
        C = torch.zeros(channels, channels)
        started = time.process_time()
        syrk_(C, x[channels])
        taken += time.process_time() - started
    return taken


def damped(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return matrix + DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix)).double()


def dense(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of M Mᵀ, descending, and its eigenvectors."""
    values, vectors = torch.linalg.eigh(M @ M.mT)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def compared(M: Tensor, basis: Tensor, rank: int, which: str = "largest") -> dict[str, Any]:
    """Energy of orthonormal columns (n, rank) in M (n, m) against the best, and the angle."""
    values, vectors = dense(M)
    some = slice(rank) if which == "largest" else slice(-rank, None)
    Q = torch.linalg.qr(basis).Q
    energy = float((Q.mT @ M).square().sum() / values[some].sum())
    edge = rank if which == "largest" else len(values) - rank
    gap = float((values[edge - 1] / values[edge].clamp_min(1e-300)).sqrt()) - 1
    best = vectors[:, some]
    sine = float(torch.linalg.matrix_norm(Q - best @ (best.mT @ Q), 2))
    return {"energy": energy - 1, "angle": sine, "gap": gap}


def accuracy(
    model: Any, task: CovarianceSet, keep: CovarianceSet, rank: int, every: int
) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for name in list(task)[::every]:
        C, D = keep[name].matrix, keep.gradients[name].matrix
        G, P = (torch.linalg.cholesky(damped(matrix)) for matrix in (C, D))
        mean = task.gradients[name].mean.double()
        N = torch.linalg.solve_triangular(G, mean.mT, upper=False)  # (Ḡ G⁻ᵀ)ᵀ
        A, _, _ = steepest_rows(mean, C, rank=rank, damping=DAMPING)
        row = {"task": compared(N, G.mT @ A.mT, rank)}
        W = linear_weight(model.get_submodule(name)).detach()
        M = P.mT @ W.double() @ G
        for which in ("largest", "smallest"):
            found = co_svd(
                W, C, rank=rank, which=which, damping=DAMPING, output_covariance=D, power=0.5
            )
            row[which] = compared(M, P.mT @ found.U, rank, which)
        rows[name] = row
    worst: dict[str, Any] = {}
    for kind in ("task", "largest", "smallest"):
        gapped = [row[kind]["angle"] for row in rows.values() if row[kind]["gap"] >= LEAST_GAP]
        worst[kind] = {
            "energy": max(abs(row[kind]["energy"]) for row in rows.values()),
            "angle": max(gapped, default=0.0),
            "gapped": len(gapped),
        }
        print(f"{kind}, {len(rows)} layers: {worst[kind]}", flush=True)
    return {"rank": rank, "worst": worst, "layers": rows}


def changes(model: Any, names: list[str], size: float, seed: int) -> Iterator[dict[str, Tensor]]:
    """One change of each layer that is named, random of rank 1, of one relative size."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        W = linear_weight(model.get_submodule(name)).detach()
        change = torch.outer(*(torch.randn(n, generator=generator) for n in W.shape))
        yield {name: change * (size * W.norm() / change.norm())}


@torch.no_grad()
def divergence(model: Any, keep: CovarianceSet, batch: Any, count: int) -> dict[str, Any]:
    ids, result = batch["input_ids"], {}
    base = log_softmax(model(input_ids=ids).logits, -1)

    def measured(change: dict[str, Tensor]) -> tuple[float, float, float]:
        for name, delta in change.items():
            linear_weight(model.get_submodule(name)).add_(delta)
        now = log_softmax(model(input_ids=ids).logits, -1)
        for name, delta in change.items():
            linear_weight(model.get_submodule(name)).sub_(delta)
        with_d = without = 0.0
        for name, delta in change.items():
            image = (delta @ keep[name].matrix) @ delta.mT
            with_d += 0.5 * float((keep.gradients[name].matrix * image).sum())
            without += 0.5 * float(image.trace())
        return float((base.exp() * (base - now)).sum(-1).mean()), with_d, without

    names = list(keep)
    picked = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:count]
    for kind, size in (("one layer", 0.1), ("all layers", 0.003)):
        found = []
        for number in range(count):
            of = [names[int(picked[number])]] if kind == "one layer" else names
            change = {k: v for each in changes(model, of, size, number) for k, v in each.items()}
            found.append(measured(change))
        kl, with_d, without = (torch.tensor(column) for column in zip(*found, strict=True))
        result[kind] = {
            "size": size,
            "with D": correlation(kl, with_d),
            "without": correlation(kl, without),
            "median of KL over estimate": float((kl / with_d).median()),
            "kl": kl.tolist(),
            "estimate": with_d.tolist(),
        }
        shown = {key: value for key, value in result[kind].items() if not isinstance(value, list)}
        print(f"{kind}: {shown}", flush=True)
    return result


def correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's."""
    ranks = [each.argsort().argsort().double() for each in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("task", type=Path)
    parser.add_argument("knowledge", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16, help="of 256 tokens each")
    parser.add_argument("--every", type=int, default=1, help="layers apart, of accuracy")
    parser.add_argument("--changes", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="time,divergence,accuracy")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    steps = arguments.only.split(",")
    model: Any = load_model(arguments.model, dtype="float32").eval()
    result: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    result["tokens"] = 256 * arguments.samples
    knowledge = text(arguments, "knowledge", arguments.samples, 0)
    if "time" in steps:
        result["time"] = times(model, knowledge, arguments.rounds)
    options: dict[str, Any] = {"sides": "both", "progress": False}
    if steps != ["time"]:
        keep = calibrate(model, knowledge, labels="sampled", **options)
    if "divergence" in steps:
        other = text(arguments, "knowledge", 2, 1)[0]
        result["divergence"] = divergence(model, keep, other, arguments.changes)
    if "accuracy" in steps:
        task = calibrate(model, text(arguments, "task", arguments.samples, 0), **options)
        with torch.no_grad():
            result["accuracy"] = accuracy(model, task, keep, arguments.rank, arguments.every)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
