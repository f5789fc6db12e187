"""Covariance selection and rank allocation against the procedure as it is written down.

The literal procedure takes a full float64 SVD of every distinct C and of every W·C of every
candidate, adds scores up and filters components one at a time. Its scores also check ours. Each
step keeps its results in FOLDER, so that no run is long:

    run() { python benches/selection.py MODEL DATA FOLDER "$@"; }
    run prepare --template 'Q: {question}\\nA: {answer[0]}' && run ours
    for i in 0 1 2 3 4; do run literal --candidate $i; done
    run report
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    calibrate,
    load_model,
    load_tokenizer,
    select_covariance,
    token_batches,
)
from corda_kernels.bench.timing import environment
from corda_kernels.documents import decode_escapes
from corda_kernels.files import write_json
from corda_kernels.init import corda_adapter
from corda_kernels.linears import linear_weight
from corda_kernels.planning import Selection, allocate_ranks, layer_spectra, uniform_budget

CANDIDATES, SAMPLES, LENGTH = 5, 4, 512
RANK = 32
DAMPING = 0.01


def candidate_file(arguments: argparse.Namespace, index: int) -> Path:
    return arguments.folder / f"candidate{index}.safetensors"


def result_file(arguments: argparse.Namespace, name: str) -> Path:
    return arguments.folder / f"{name}.json"


def prepare(arguments: argparse.Namespace) -> None:
    """Calibrates the candidates: the forward passes, which both procedures need."""
    model = load_model(arguments.model)
    batches = token_batches(
        arguments.data,
        load_tokenizer(arguments.model),
        samples=CANDIDATES * SAMPLES,
        seq_len=LENGTH,
        template=decode_escapes(arguments.template),
    )
    seconds = []
    for index in range(CANDIDATES):
        started = time.perf_counter()
        covariances = calibrate(model, batches[index::CANDIDATES], progress=False)
        seconds.append(time.perf_counter() - started)
        covariances.provenance["domain"] = arguments.data.name
        covariances.save(candidate_file(arguments, index))
    write_json(result_file(arguments, "prepare"), {"data": arguments.data.name, "seconds": seconds})


class Watch:
    """Loads candidates on demand, outside of the clock, and counts the matrices that are alive."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0
        self.one_set = 0
        self.seconds = 0.0

    def load(self, path: Path) -> CovarianceSet:
        started = time.perf_counter()
        gc.collect()
        before = sum(m.numel() * m.element_size() for ref in self.alive if (m := ref()) is not None)
        covariances = CovarianceSet.load(path)
        matrices = [covariance.matrix for covariance, _ in covariances.groups()]
        self.alive += map(weakref.ref, matrices)
        self.one_set = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
        self.most = max(self.most, before + self.one_set)
        self.seconds += time.perf_counter() - started
        return covariances


def ours(arguments: argparse.Namespace) -> None:
    """Selection and allocation; beside them plain CorDA, a uniform rank from one candidate."""
    model = load_model(arguments.model)
    watch = Watch()
    started = time.perf_counter()
    chosen = select_covariance(
        model,
        (partial(watch.load, candidate_file(arguments, i)) for i in range(CANDIDATES)),
        damping=DAMPING,
        progress=False,
    )
    selection = time.perf_counter() - started - watch.seconds
    modules = {name: model.get_submodule(name) for name in chosen}
    shapes = {name: tuple(linear_weight(module).shape) for name, module in modules.items()}
    started = time.perf_counter()
    spectra = layer_spectra(modules, chosen, damping=DAMPING)
    ranks = allocate_ranks(
        {name: spectrum.singular_values for name, spectrum in spectra.items()},
        {name: spectrum.log_condition for name, spectrum in spectra.items()},
        shapes,
        budget=uniform_budget(shapes, RANK),
    )
    allocation = time.perf_counter() - started
    first = CovarianceSet.load(candidate_file(arguments, 0))
    started = time.perf_counter()
    corda_adapter(model, first, CordaConfig("kpm", rank=RANK, progress=False))
    plain = time.perf_counter() - started
    write_json(
        result_file(arguments, "ours"),
        {
            "selection": selection,
            "allocation": allocation,
            "plain": plain,
            "peak_sets": watch.most / watch.one_set,
            "set_bytes": watch.one_set,
            "report": chosen.provenance["selection"],
            "ranks": ranks,
        },
    )


def literal(arguments: argparse.Namespace) -> None:
    """Scores one candidate by full SVDs."""
    model = load_model(arguments.model)
    covariances = CovarianceSet.load(candidate_file(arguments, arguments.candidate))
    results: dict[str, Any] = {"seconds": 0.0, "scores": {}, "spectra": {}, "log_condition": {}}
    for covariance, names in covariances.groups():
        C = covariance.matrix.double()
        C.diagonal().add_(DAMPING * C.diagonal().mean())
        weights = [linear_weight(model.get_submodule(name)).detach().double() for name in names]
        started = time.perf_counter()
        condition = torch.linalg.svd(C).S
        spectra = [torch.linalg.svd(W @ C).S for W in weights]
        results["seconds"] += time.perf_counter() - started
        for name, W, S in zip(names, weights, spectra, strict=True):
            log_pi = math.log(math.sqrt(W.shape[0]) * float(condition[0] / condition[-1]))
            results["scores"][name] = log_pi * float((S / S[0]).sum())
            results["log_condition"][name] = log_pi
            results["spectra"][name] = S.tolist()
    write_json(result_file(arguments, f"literal{arguments.candidate}"), results)


def literal_loop(
    spectra: dict[str, list[float]],
    log_condition: dict[str, float],
    costs: dict[str, int],
    budget: int,
) -> dict[str, int]:
    """KPM's filtering, one component at a time."""
    left = {name: list(spectrum) for name, spectrum in spectra.items()}
    sums = {name: math.fsum(spectrum) for name, spectrum in spectra.items()}

    def score(name: str) -> float:
        *rest, smallest = left[name][-2:]
        return log_condition[name] * smallest / (sums[name] - smallest) if rest else math.inf

    scores = {name: score(name) for name in spectra}
    while scores:
        name = min(scores, key=scores.__getitem__)
        if budget < costs[name]:
            break
        budget -= costs[name]
        sums[name] -= left[name].pop()
        if left[name]:
            scores[name] = score(name)
        else:
            del scores[name]
    return {name: len(spectra[name]) - len(left[name]) for name in spectra}


def report(arguments: argparse.Namespace) -> None:
    """Compares, prints, and writes `selection.json`."""
    read = {
        name: json.loads(result_file(arguments, name).read_text())
        for name in ("prepare", "ours", *(f"literal{i}" for i in range(CANDIDATES)))
    }
    mine, literals = read["ours"], [read[f"literal{i}"] for i in range(CANDIDATES)]
    selection = Selection.from_json(mine["report"])
    error = max(
        abs(score / literals[i]["scores"][name] - 1)
        for name, scores in selection.scores.items()
        for i, score in enumerate(scores)
    )
    winners = selection.winners()
    right = 0
    for names in selection.groups:
        totals = [math.fsum(each["scores"][name] for name in names) for each in literals]
        right += all(winners[name] == totals.index(min(totals)) for name in names) * len(names)
    model = load_model(arguments.model)
    shapes = {name: tuple(linear_weight(model.get_submodule(name)).shape) for name in winners}
    started = time.perf_counter()
    expected = literal_loop(
        {name: literals[winner]["spectra"][name] for name, winner in winners.items()},
        {name: literals[winner]["log_condition"][name] for name, winner in winners.items()},
        {name: sum(shape) for name, shape in shapes.items()},
        uniform_budget(shapes, RANK),
    )
    loop = time.perf_counter() - started
    total = sum(each["seconds"] for each in literals) + loop
    spent = mine["selection"] + mine["allocation"]
    ranks = sorted(mine["ranks"].values())
    used = sum(rank * sum(shapes[name]) for name, rank in mine["ranks"].items())
    described = environment(torch.device("cpu"))
    lines = [
        ", ".join(f"{key} {value}" for key, value in described.items()),
        f"{CANDIDATES} candidates of {SAMPLES} x {LENGTH} tokens of {read['prepare']['data']}, "
        f"{len(winners)} layers, {len(selection.groups)} inputs",
        f"forward passes and covariances     {sum(read['prepare']['seconds']):8.1f} s",
        f"literal: SVD of every C and W C    {total - loop:8.1f} s",
        f"literal: filtering loop            {loop:8.1f} s",
        f"ours: selection                    {mine['selection']:8.1f} s",
        f"ours: allocation                   {mine['allocation']:8.1f} s",
        f"literal / ours                     {total / spent:8.1f}",
        f"plain CorDA's decompositions       {mine['plain']:8.1f} s (rank {RANK}, one candidate)",
        f"winners that are the literal argmin {right} of {len(winners)}",
        f"largest relative error of a score   {error:.1e}",
        f"covariances in memory at the peak   {mine['peak_sets']:.2f} sets of "
        f"{mine['set_bytes'] / 2**20:.0f} MiB",
        f"ranks at the budget of r = {RANK}: {ranks[0]} to {ranks[-1]}, median "
        f"{statistics.median(ranks):.0f}, {ranks.count(0)} layers without, {used:,} of "
        f"{uniform_budget(shapes, RANK):,} parameters; as the literal loop's in "
        f"{sum(mine['ranks'][n] == expected[n] for n in expected)} of {len(expected)} layers",
        f"selection: {selection.summary()}",
    ]
    print("\n".join(lines))
    write_json(
        arguments.folder / "selection.json",
        {"environment": described, "ratio": total / spent, "error": error, "right": right}
        | {key: mine[key] for key in ("selection", "allocation", "plain", "peak_sets", "ranks")}
        | {"literal": [each["seconds"] for each in literals], "loop": loop},
    )


STEPS = {"prepare": prepare, "ours": ours, "literal": literal, "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--template", default=r"Q: {question}\nA: {answer[0]}")
    parser.add_argument("--candidate", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        STEPS[arguments.step](arguments)


if __name__ == "__main__":
    main()
