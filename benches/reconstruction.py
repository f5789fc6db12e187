"""What the published reconstruction costs in accuracy, next to the projection.

Relative Frobenius errors of B A against float64 (the projection on singular vectors of a full
float64 SVD), for both ends and in both precisions:

    published   an SVD of W·C and an explicit inverse of C in that precision, as published
    inverse     U from co_svd, rounded to that precision, then A through C⁻¹
    projection  the same U, and A as a projection of W (published_factors)

The last two differ in the reconstruction alone. Where float32 cannot invert C, `inverse` takes the
least damping that works, and `published` what torch.linalg.inv returns. In float32 the function
takes components of W below max(out, in)·eps·‖W‖ for zero, which counts in some q_proj.

    python benches/reconstruction.py --json benches/results/cpu-reconstruction.json
    python benches/reconstruction.py --model MODEL --cov COVARIANCES --every 10 \\
        --json benches/results/cpu-reconstruction-smollm2.json
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from corda_kernels import CovarianceSet, co_svd, load_model
from corda_kernels.adapter import published_factors
from corda_kernels.adapter.factors import component_rows
from corda_kernels.bench.timing import environment
from corda_kernels.files import write_json
from corda_kernels.linalg import CoSVD, End, regularized_inverse
from corda_kernels.linears import linear_weight
from corda_kernels.outputs import check_output

RANK = 32
ENDS: tuple[tuple[str, End], ...] = (("IPM", "largest"), ("KPM", "smallest"))
DTYPES = {"float32": torch.float32, "float64": torch.float64}
METHODS = ("published", "inverse", "projection")
DIGITS = (2, 4, 6, 8, 10, 12)
SIZE = 256

Errors = dict[tuple[str, str, str], float]


def synthetic() -> Iterator[tuple[str, Tensor, Tensor]]:
    """A Gaussian weight, and covariances with log-spaced spectra."""
    torch.manual_seed(0)
    W = torch.randn(SIZE, SIZE, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64)).Q
    for digits in DIGITS:
        C = (Q * torch.logspace(0, -digits, SIZE, dtype=torch.float64)) @ Q.T
        yield f"cond(C) = 1e{digits}", W, (C + C.T) / 2


def real(
    model: Path, covariances: Path, every: int, damping: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every so many layers of a model, by the last part of their names."""
    loaded = load_model(str(model))
    inputs = CovarianceSet.load(covariances)
    for block, name in enumerate(inputs):
        if block % every:
            continue
        C = inputs[name].matrix.double()
        C.diagonal().add_(damping * C.diagonal().mean())
        W = linear_weight(loaded.get_submodule(name)).detach().double()
        yield name.rpartition(".")[2], W, C


def through_inverse(weight: Tensor, part: CoSVD, covariance: Tensor) -> tuple[Tensor, float]:
    """B A by the published reconstruction, U·ΣVᵀ(C + λI)⁻¹ with ΣVᵀ = UᵀW(C + λI), and λ.

    λ is the decomposition's; where that has none, the inverse takes the least that works, as a
    multiple of the mean diagonal of C.
    """
    rows, noise = component_rows(weight, part)
    C, damping = covariance.to(rows), float(part.damping)
    found = regularized_inverse(C, damping=damping or None)
    rows = (rows @ C + damping * C.diagonal().mean() * rows) @ found.inverse
    live = rows.norm(dim=1) > noise
    return part.U @ torch.where(live[:, None], rows, 0.0), float(found.damping)


def errors(W: Tensor, C: Tensor) -> Errors:
    """By end, dtype and method; NaN where an inverse cannot be had."""
    exact = torch.linalg.svd(W @ C, full_matrices=False).U
    ours = {end: co_svd(W, C, rank=RANK, which=which, method="exact") for end, which in ENDS}
    found: Errors = {}
    for label, dtype in DTYPES.items():
        w, c = W.to(dtype), C.to(dtype)
        u, s, vh = torch.linalg.svd(w @ c, full_matrices=False)
        inverse, info = torch.linalg.inv_ex(c)
        if int(info):
            inverse.fill_(torch.nan)
        for end, _ in ENDS:
            kept = slice(RANK) if end == "IPM" else slice(-RANK, None)
            U = exact[:, kept]
            expected = U @ (U.T @ W)
            part = ours[end]
            part = CoSVD(part.U.to(dtype), part.S.to(dtype), part.damping, part.residual)
            projection = published_factors(w, part)
            products = {
                "published": (u[:, kept] * s[kept]) @ (vh[kept] @ inverse),
                "inverse": through_inverse(w, part, c)[0],
                "projection": projection.B @ projection.A,
            }
            for method, product in products.items():
                error = (product.double() - expected).norm() / expected.norm()
                found[end, label, method] = float(error)
    return found


def table(title: str, rows: dict[str, list[Errors]]) -> str:
    """Medians and, of more than one layer, the worst."""
    columns = [(label, method) for label in DTYPES for method in METHODS]
    lines = [title]
    for end, _ in ENDS:
        lines += [
            "",
            f"{end:15}" + "".join(f"{label:>15}" for label, _ in columns),
            " " * 15 + "".join(f"{method:>15}" for _, method in columns),
        ]
        for name, found in rows.items():
            cells = []
            for column in columns:
                values = [each[(end, *column)] for each in found]
                worst = f" ({max(values):.0e})" if len(values) > 1 else ""
                cells.append(f"{statistics.median(values):.0e}{worst}")
            lines.append(f"{name:15}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cov", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take one layer in so many")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--json", type=Path, help="a file for all results")
    arguments = parser.parse_args()
    if arguments.json is not None:
        check_output(arguments.json)
    described = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    rows: dict[str, list[Errors]] = defaultdict(list)
    if arguments.model is None:
        title = f"W {SIZE} x {SIZE} Gaussian, C log-spaced, rank {RANK}"
        layers = synthetic()
    else:
        title = (
            f"{arguments.model.name}, {arguments.cov.name}, rank {RANK}, "
            f"damping {arguments.damping}: median and (worst) of the layers"
        )
        layers = real(arguments.model, arguments.cov, arguments.every, arguments.damping)
    for name, W, C in layers:
        rows[name].append(errors(W, C))
    print(table(title, rows))
    if arguments.json is not None:
        write_json(
            arguments.json,
            {"environment": described, "title": title}
            | {"errors": {name: list(map(nested, found)) for name, found in rows.items()}},
        )


def nested(found: Errors) -> dict[str, dict[str, dict[str, float | None]]]:
    """By end, dtype and method; None for NaN, which JSON does not know."""
    return {
        end: {
            label: {
                method: None if math.isnan(error := found[end, label, method]) else error
                for method in METHODS
            }
            for label in DTYPES
        }
        for end, _ in ENDS
    }


if __name__ == "__main__":
    main()
