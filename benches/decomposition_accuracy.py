"""The decomposition of every linear layer of a model against a float64 SVD: the worst layers.

    python benches/decomposition_accuracy.py MODEL COVARIANCES [--damping 0.01 0] [--json OUT]

By default damped as `init` does, and then not at all. COVARIANCES is a file that `corda-kernels
calibrate` wrote. The bounds: B A of the largest components within 1e-5 (undamped 1e-4) of the
reference; tail energy of the smallest at most 1.001 (1.01) times the least possible, and their B A
within 1e-3 (finite) wherever the spectrum has a gap of 1 %. Exit status 1 if one of them does not
hold.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from svd_cases import (
    EPS,
    Reference,
    adapter_error,
    reference,
    tail_energy_ratio,
)
from torch import Tensor
from transformers.utils import logging

from corda_kernels import CovarianceSet, load_model
from corda_kernels.bench.timing import environment
from corda_kernels.files import write_json
from corda_kernels.linalg import co_svd_layers, parallel_map
from corda_kernels.linears import linear_weight
from corda_kernels.outputs import check_output

LEAST_GAP = 0.01
WORST = 5


@dataclass(frozen=True)
class Bounds:
    top: float  # relative error of B A, largest components
    energy: float  # tail energy ratio, smallest components
    bottom: float  # relative error of B A, smallest components, where there is a gap


DAMPED = Bounds(top=1e-5, energy=1.001, bottom=1e-3)
UNDAMPED = Bounds(top=1e-4, energy=1.01, bottom=math.inf)


@dataclass(frozen=True)
class Errors:
    name: str
    condition: float  # of W·(C + λI)
    top: float
    energy: float
    bottom: float
    gap: float


def measured(
    weights: Mapping[str, Tensor], matrices: Mapping[str, Tensor], rank: int, damping: float
) -> list[Errors]:
    top, bottom = (
        dict(co_svd_layers(weights, matrices, rank=rank, which=which, damping=damping))
        for which in ("largest", "smallest")
    )

    def errors(name: str) -> Errors:
        W = weights[name].double()
        exact = reference(weights[name], matrices[name], damping)
        U_top, U_bottom = top[name].U, bottom[name].U
        return Errors(
            name,
            float(exact.S[0] / exact.S[-1]),
            adapter_error(U_top @ (U_top.mT @ W), exact, "largest", rank),
            tail_energy_ratio(U_bottom, exact),
            adapter_error(U_bottom @ (U_bottom.mT @ W), exact, "smallest", rank),
            bottom_gap(exact, rank),
        )

    return list(parallel_map(errors, weights))


def bottom_gap(exact: Reference, rank: int) -> float:
    """σ of the last component left out over the first of the `rank` smallest, less 1.

    NaN where the former is zero to working precision: which null directions are meant is then a
    question to W, which the singular values do not answer; infinite if there are none left out.
    """
    R = exact.S.shape[0]
    if rank == R:
        return math.inf
    above, below = float(exact.S[R - rank - 1]), float(exact.S[R - rank])
    if above <= R * EPS * float(exact.S[0]):
        return math.nan
    return above / below - 1 if below > 0 else math.inf


def report(title: str, attribute: str, bound: float, rows: list[Errors]) -> bool:
    """Prints the worst layers by one error, and returns whether all are within the bound."""
    rows = sorted(rows, key=lambda row: _order(getattr(row, attribute)), reverse=True)
    values = [getattr(row, attribute) for row in rows]
    # Of a bound that is infinite only the finite keep it.
    held = all(math.isfinite(value) and value <= bound for value in values)
    wanted = f"at most {bound:g}" if math.isfinite(bound) else "finite"
    verdict = "holds" if held else "DOES NOT HOLD"
    print(f"{title}: {wanted} in {len(rows)} layers: {verdict}")
    for row in rows[:WORST]:
        value = getattr(row, attribute)
        shown = f"1 + {value - 1:.1e}" if attribute == "energy" else f"{value:.1e}"
        print(f"    {shown:<12} cond {row.condition:.0e}, gap {row.gap:.1%}  {row.name}")
    return held


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def run(damping: float, rank: int, rows: list[Errors]) -> dict[str, Any]:
    """Prints what was found at one damping, and returns it as a JSON object."""
    bounds = DAMPED if damping else UNDAMPED
    conditions = [row.condition for row in rows]
    lowest, highest = min(conditions), max(conditions)
    print(f"damping {damping:g}, rank {rank}: cond(WC) {lowest:.0e} to {highest:.0e}")
    gapped = [row for row in rows if row.gap >= LEAST_GAP]
    finite = all(math.isfinite(row.top) and math.isfinite(row.bottom) for row in rows)
    print(f"B A is finite at both ends of all layers: {'holds' if finite else 'DOES NOT HOLD'}")
    held = [
        finite,
        report("largest, error of B A", "top", bounds.top, rows),
        report("smallest, tail energy over the least", "energy", bounds.energy, rows),
        report("smallest, error of B A where the gap is 1 %", "bottom", bounds.bottom, gapped),
    ]
    return {
        "damping": damping,
        "held": all(held),
        "condition": [lowest, highest],
        "top": _finite(max(row.top for row in rows)),
        "energy": _finite(max(row.energy for row in rows)),
        "bottom": _finite(max((row.bottom for row in gapped), default=math.nan)),
        "layers": [
            # JSON knows no infinity: a gap without an end has no number.
            {key: _finite(value) for key, value in asdict(row).items()}
            for row in rows
        ],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("covariances", type=Path)
    parser.add_argument("--damping", type=float, nargs="+", default=[0.01, 0.0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", type=Path, help="a file for all results")
    arguments = parser.parse_args()
    if arguments.json is not None:
        check_output(arguments.json)
    logging.disable_progress_bar()
    model = load_model(arguments.model)
    covariances = CovarianceSet.load(arguments.covariances)
    weights = {name: linear_weight(model.get_submodule(name)).detach() for name in covariances}
    matrices = {name: covariances[name].matrix for name in covariances}
    described = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    runs = []
    for damping in arguments.damping:
        with torch.no_grad():
            rows = measured(weights, matrices, arguments.rank, damping)
        runs.append(run(damping, arguments.rank, rows))
    if arguments.json is not None:
        about = {"environment": described, "model": Path(arguments.model).name}
        about |= {"rank": arguments.rank, "least_gap": LEAST_GAP}
        write_json(arguments.json, about | {"runs": runs})
    return 0 if all(each["held"] for each in runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
