"""Gradients on a real model: what gathering costs, what starts capture, what D says of the KL.

    python benches/gradients.py MODEL TASK KNOWLEDGE [--json OUT] [--only time,divergence,accuracy]

TASK is a file of GSM8K, KNOWLEDGE one of NQ Open, see `benches/finetune.py`.

time: a pass that takes gradients over a forward pass without its head, and over that and the
products (of one 1,024-token batch; C alone, then C, D and Ḡ).
accuracy: energy that task starts and two-sided components hold, over the most (for the smallest
components: the least) that any of the same rank do, and the largest angle between their rows and
the best ones where the singular values have a gap of 1 %; the best by dense float64 SVDs.
divergence: of random changes ΔW the rank correlation of ½ Σ ρ tr(D ΔW C ΔWᵀ), see `DriftPenalty`,
with the measured mean KL divergence from the base on other text of the kind. The protocol was
written before its first run, that of --seed 0. ρ was found by looking at that one, so that the
changes of --seed 1 judge it. All changes have the same root mean square over the 210 layers of
‖ΔW‖/‖W‖, 0.003; each changes a random number of random layers by random matrices of a random rank
(both numbers log-uniform, 1 to 210 and 1 to 64), all its layers by the same ‖ΔW‖/‖W‖; D and C are
of 8 sequences of 256 tokens and one draw of labels; the KL is that of 4 sequences. Beside it, to
tell the reasons: the estimate without ρ, and without D; the same quadratic form of the same
gradients without the assumptions that x and g are independent, tokens and layers uncorrelated; and
how well the KL of one half of the text tells that of the other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
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
from corda_kernels.targets import target_linears
from corda_kernels.text import token_batches

TEMPLATES = {
    "task": "Question: {question}\nAnswer: {answer}",
    "knowledge": "Q: {question}\nA: {answer[0]}",
}
DAMPING = 0.01
LEAST_GAP = 0.01
KINDS = ("task", "largest", "smallest")
SIZE = 0.003  # of changes, over the weights
FISHER = ("tokens and layers apart", "layers apart", "all together")


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


Decomposed = tuple[Tensor, Tensor, Tensor]


def compared(M: Tensor, dense: Decomposed, basis: Tensor, which: str) -> dict[str, Any]:
    """Energy of columns (n, rank) in M (n, m) against the best, and the angles of both sides."""
    U, S, Vh = dense
    rank = basis.shape[1]
    some = slice(rank) if which == "largest" else slice(-rank, None)
    Q = torch.linalg.qr(basis).Q
    rows = torch.linalg.qr(M.mT @ Q).Q
    energy = float((Q.mT @ M).square().sum() / S[some].square().sum())
    edge = rank if which == "largest" else len(S) - rank
    gap = float(S[edge - 1] / S[edge].clamp_min(1e-300)) - 1
    left, right = sine(Q, U[:, some]), sine(rows, Vh[some].mT)
    return {"energy": energy - 1, "angle": max(left, right), "gap": gap}


def sine(found: Tensor, best: Tensor) -> float:
    """Of the largest angle between the spans of orthonormal columns."""
    return float(torch.linalg.matrix_norm(found - best @ (best.mT @ found), 2))


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
        dense = torch.linalg.svd(N, full_matrices=False)
        row = {"shape": list(mean.shape), "task": compared(N, dense, G.mT @ A.mT, "largest")}
        W = linear_weight(model.get_submodule(name)).detach()
        M = P.mT @ W.double() @ G
        dense = torch.linalg.svd(M, full_matrices=False)
        for which in ("largest", "smallest"):
            found = co_svd(
                W, C, rank=rank, which=which, damping=DAMPING, output_covariance=D, power=0.5
            )
            row[which] = compared(M, dense, P.mT @ found.U, which)
        rows[name] = row
        shown = (f"{kind} {row[kind]['energy']:.1e} {row[kind]['angle']:.1e}" for kind in KINDS)
        print(f"{name}: {', '.join(shown)}", file=sys.stderr, flush=True)
    worst: dict[str, Any] = {}
    for kind in KINDS:
        gapped = [row[kind]["angle"] for row in rows.values() if row[kind]["gap"] >= LEAST_GAP]
        worst[kind] = {
            "energy": max(abs(row[kind]["energy"]) for row in rows.values()),
            "angle": max(gapped, default=0.0),
            "gapped": len(gapped),
        }
        print(f"{kind}, {len(rows)} layers: {worst[kind]}", flush=True)
    return {"rank": rank, "worst": worst, "layers": rows}


Change = dict[str, tuple[Tensor, Tensor]]  # of each layer that is changed B (out, r) and A (r, in)


def changes(model: Any, names: list[str], count: int, seed: int) -> list[Change]:
    """Random changes of one relative size; see the head of this file."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Change] = []
    for _ in range(count):
        shares = torch.rand(2, generator=generator).tolist()
        layers, rank = (
            round(most**share) for most, share in zip((len(names), 64), shares, strict=True)
        )
        change: Change = {}
        for index in torch.randperm(len(names), generator=generator)[:layers].tolist():
            W = linear_weight(model.get_submodule(names[index])).detach()
            B = torch.randn(len(W), rank, generator=generator)
            A = torch.randn(rank, W.shape[1], generator=generator)
            size = SIZE * (len(names) / layers) ** 0.5 * W.norm() / (B @ A).norm()
            change[names[index]] = B * size, A
        made.append(change)
    return made


def estimates(keep: CovarianceSet, change: Change) -> tuple[float, float, float]:
    """½ Σ ρ tr(D ΔW C ΔWᵀ), the same without ρ, and without ρ and D."""
    scaled = with_d = without = 0.0
    for name, (B, A) in change.items():
        C, gradient = keep[name].matrix, keep.gradients[name]
        ratio = float(gradient.fisher_trace / (gradient.matrix.trace() * C.trace()))
        inner = A @ C @ A.mT
        part = 0.5 * float(((B.mT @ gradient.matrix @ B) * inner).sum())
        scaled += ratio * part
        with_d += part
        without += 0.5 * float(((B.mT @ B) * inner).sum())
    return scaled, with_d, without


@torch.no_grad()
def measured(model: Any, batches: list[Any], changed: list[Change]) -> Tensor:
    """The mean KL divergence from the base over the vocabulary, (sequences, changes)."""
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        base = log_softmax(model(input_ids=ids).logits, -1)
        for change in changed:
            weights = {name: linear_weight(model.get_submodule(name)) for name in change}
            before = {name: weight.clone() for name, weight in weights.items()}
            for name, (B, A) in change.items():
                weights[name].addmm_(B, A)
            now = log_softmax(model(input_ids=ids).logits, -1)
            for name, weight in weights.items():
                weight.copy_(before[name])
            found.append((base.exp() * (base - now)).sum(-1).double().mean(-1))
    return torch.cat(found).view(len(batches), len(changed), -1).mT.flatten(0, 1)


def gathered(
    model: Any, batches: list[Any], changed: list[Change]
) -> tuple[CovarianceSet, dict[str, Tensor]]:
    """D and C of sampled labels; and by the same labels what the estimate approximates: the mean of
    ½ s², s being the first-order change of the loss, whose parts are squared apart or together."""
    total = {kind: torch.zeros(len(changed), dtype=torch.float64) for kind in FISHER}
    zeros = [torch.zeros(())] * len(changed)
    together = list(zeros)  # of the present pass

    def watch(name: str, module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(partial(add, name, args[0].detach()))

    @torch.no_grad()
    def add(name: str, x: Tensor, g: Tensor) -> None:
        for number, change in enumerate(changed):
            if name in change:
                B, A = change[name]
                s = ((g @ B) * (x @ A.mT)).sum(-1).double()  # (batch, seq)
                total["tokens and layers apart"][number] += 0.5 * s.square().sum()
                total["layers apart"][number] += 0.5 * s.sum(-1).square().sum()
                together[number] = together[number] + s.sum(-1)

    def end_pass(*_: Any) -> None:
        for number, s in enumerate(together):
            total["all together"][number] += 0.5 * s.square().sum()
        together[:] = zeros

    names = {name for change in changed for name in change}
    hooks = [model.get_submodule(n).register_forward_hook(partial(watch, n)) for n in names]
    hooks.append(model.register_forward_pre_hook(end_pass))
    keep = calibrate(model, batches, sides="both", labels="sampled", progress=False)
    end_pass()
    for hook in hooks:
        hook.remove()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return keep, {kind: values / tokens for kind, values in total.items()}


def divergence(
    model: Any, kept: list[Any], other: list[Any], count: int, seed: int
) -> dict[str, Any]:
    changed = changes(model, list(target_linears(model)), count, seed)
    keep, rows = gathered(model, kept, changed)
    estimated = torch.tensor([estimates(keep, change) for change in changed])
    ways = ("½ ρ tr(D ΔW C ΔWᵀ)", "½ tr(D ΔW C ΔWᵀ)", "without D")
    rows = dict(zip(ways, estimated.unbind(1), strict=True)) | rows
    one_by_one = measured(model, other, changed)
    half, kl = len(one_by_one) // 2, one_by_one.mean(0)
    result: dict[str, Any] = {
        "changes": [[len(each), len(next(iter(each.values()))[1])] for each in changed],
        "correlation": {name: correlation(values, kl) for name, values in rows.items()},
        "halves of the text": correlation(one_by_one[:half].mean(0), one_by_one[half:].mean(0)),
        "median of KL over estimate": float((kl / estimated[:, 0]).median()),
        "kl": one_by_one.tolist(),
        "estimates": {name: values.tolist() for name, values in rows.items()},
    }
    for key in ("correlation", "halves of the text", "median of KL over estimate"):
        print(f"{key}: {result[key]}", flush=True)
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
    parser.add_argument("--samples", type=int, default=8, help="of 256 tokens each")
    parser.add_argument("--every", type=int, default=1, help="layers apart, of accuracy")
    parser.add_argument("--changes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the changes")
    parser.add_argument("--measured", type=int, default=4, help="sequences, of the KL")
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
    if "divergence" in steps:
        other = text(arguments, "knowledge", arguments.measured, 1)
        result["divergence"] = divergence(
            model, knowledge, other, arguments.changes, arguments.seed
        )
    if "accuracy" in steps:
        options: dict[str, Any] = {"sides": "both", "progress": False}
        keep = calibrate(model, knowledge, labels="sampled", **options)
        task = calibrate(model, text(arguments, "task", arguments.samples, 0), **options)
        with torch.no_grad():
            result["accuracy"] = accuracy(model, task, keep, arguments.rank, arguments.every)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
