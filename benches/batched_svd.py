"""The Jacobi kernel against what torch offers for the SVD of many small matrices.

python benches/batched_svd.py --sizes 64,128,192,224 --json results.json
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda_kernels.bench.timing import Timing, environment, measure
from corda_kernels.errors import CordaError
from corda_kernels.files import write_json
from corda_kernels.kernels import available_backends, batched_svd, reference, use_backend
from corda_kernels.outputs import check_output

# Largest of the errors below up to which a speed is worth printing. The Gram matrix squares: its
# small singular values are only right to the root of eps, which is its own bound.
_ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-7}
_SMALLEST = 1e-6  # of the singular values, the largest being 1

Method = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """One method on one case.

    Attributes:
        method: "gram" (float64 Gram matrix and batched eigh) is the baseline.
        batch: number of matrices.
        size: their width l.
        dtype: of the matrices; "gram" computes in float64 in any case.
        error: the largest over the batch of the errors of S and of USU against float64 and of U's
            orthonormality, each relative to the largest singular value.
        timing: seconds for the batch; None if the result is wrong.
        speedup: baseline's median over this one's.
    """

    method: str
    batch: int
    size: int
    dtype: str
    error: float
    timing: Timing | None = None
    speedup: float | None = None


@torch.no_grad()
def bench_batched_svd(
    batch: int, size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Row]:
    """Yields the baseline's row, then those of torch.linalg.svd and of the kernel where it runs.

    The kernel is timed as `kernels.batched_svd` runs it: where a matrix does not fit into shared
    memory that is the baseline again, within a speedup of 1.
    """
    t = _matrices(batch, size, device)
    exact = torch.linalg.svdvals(t.cpu()).to(device)
    inputs = [t.to(dtype)]
    base: float | None = None
    for name, method in _methods().items():
        error = _error(t, exact, *method(inputs[0]))
        facts = (name, batch, size, str(dtype).removeprefix("torch."), error)
        if not error <= _ALLOWED[dtype]:
            yield Row(*facts)
            continue
        timing = measure(method, inputs, device)
        base = timing.p50 if name == "gram" else base
        yield Row(*facts, timing, base / timing.p50 if base else None)


def _matrices(batch: int, size: int, device: torch.device) -> Tensor:
    """Float64, with singular values log-spaced from 1 to 1e-6 between random directions."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, batch, size, size)
    plain = torch.randn(shape, dtype=torch.float64, device=device, generator=generator)
    left, right = torch.linalg.qr(plain).Q
    last = math.log10(_SMALLEST)
    values = torch.logspace(0, last, size, dtype=torch.float64, device=device)
    result: Tensor = left * values @ right
    return result


def _methods() -> dict[str, Method]:
    def gram(t: Tensor) -> tuple[Tensor, Tensor]:
        U, S = reference.gram_svd(t.double())
        return U.to(t.dtype), S.to(t.dtype)

    def linalg(t: Tensor) -> tuple[Tensor, Tensor]:
        U, S, _ = torch.linalg.svd(t)
        return U, S

    def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend("cuda"):
            return batched_svd(t)

    methods: dict[str, Method] = {"gram": gram, "linalg.svd": linalg}
    if available_backends("batched_svd")["cuda"] is None:
        methods["cuda"] = kernel
    return methods


def _error(t: Tensor, exact: Tensor, U: Tensor, S: Tensor) -> float:
    U, S = U.double(), S.double()
    identity = torch.eye(t.shape[-1], dtype=torch.float64, device=t.device)
    rows = U.mT @ t
    errors = (
        S - exact,
        U.mT @ U - identity,
        rows @ rows.mT - torch.diag_embed(S.square()),
    )
    return max(float(error.abs().max()) for error in errors)


def line(row: Row) -> str:
    """One line of the table that `main` prints."""
    case = f"{row.method:<10} {row.batch:>5} {row.size:>4} {row.dtype:>8}"
    if row.timing is None:
        return f"{case} {'wrong: no speed':>38} {row.error:>8.1e}"
    speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
    return f"{case} {row.timing.milliseconds()} {speedup:>8} {row.error:>8.1e}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of all cases, and writes them to a file if one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="64,96,128,160,192,224", help="separated by commas")
    parser.add_argument("--batch", type=int, default=128, help="number of matrices")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="a file for all results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        sizes = [int(size) for size in options.sizes.split(",")]
        if options.json is not None:
            check_output(options.json)
    except (ValueError, CordaError) as error:
        parser.error(str(error))
    described = environment(device)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    reason = available_backends("batched_svd")["cuda"]
    if reason is not None:
        print(f"without backend cuda: {reason}")
    print(
        f"{'method':<10} {'batch':>5} {'l':>4} {'dtype':>8} {'p20 ms':>9} {'p50 ms':>9} "
        f"{'p80 ms':>9} {'× gram':>8} {'error':>8}"
    )
    rows: list[dict[str, Any]] = []
    for dtype, size in itertools.product((torch.float32, torch.float64), sizes):
        for row in bench_batched_svd(options.batch, size, dtype, device):
            print(line(row), flush=True)
            rows.append(asdict(row))
            if options.json is not None:
                write_json(options.json, {"environment": described, "rows": rows})


if __name__ == "__main__":
    main()
