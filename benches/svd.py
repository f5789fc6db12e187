"""CO-SVD at both ends against the published procedure and what else torch offers.

For the largest components (IPM) and the smallest (KPM). Prints seconds, the ratio to PEFT and the
error against float64. A result that is wrong gets no time.

    python benches/svd.py [--cases CASES] [--model M --cov C] [--methods METHODS] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from svd_cases import (
    CASES,
    DAMPING,
    Case,
    Part,
    check_case,
    end_error,
    make_case,
    references,
)
from torch import Tensor, nn

from corda_kernels.bench.timing import Timing, environment, measure
from corda_kernels.errors import ConfigError
from corda_kernels.files import write_json
from corda_kernels.linalg import End, co_svd_layers

BASELINE = "published"
# Drivers of cuSOLVER. torch names gesvdp in its own heuristics only; where it lets itself be asked
# for by name, it runs.
_DRIVERS = ("gesvd", "gesvdj", "gesvda", "gesvdp")
HEADER = (
    f"{'case':<13} {'layers':>6} {'r':>4} {'end':<8} {'method':<11} {'p50 s':>9} "
    f"{'× published':>11} {'error':>11}"
)
Parts = dict[End, dict[str, Part]]


@dataclass(frozen=True)
class Method:
    """A way to decompose the layers of a case.

    Attributes:
        run: the case and the ends wanted → the parts, by end and layer.
        at_once: whether one run yields all ends that it is meant for.
        allowed: the largest errors up to which its speed is worth printing, by the ends that it is
            meant for.
    """

    run: Callable[[Case, Iterable[End]], Parts]
    at_once: bool
    allowed: Mapping[End, float]


# Ours is held to what the package promises, float32 to what it can do at its best.
_EXACT: dict[End, float] = {"largest": 1e-5, "smallest": 1.001}
_SINGLE: dict[End, float] = {"largest": 1e-2, "smallest": 1.01}


def methods(device: torch.device, names: Sequence[str] = ()) -> dict[str, Method]:
    """Those that this machine has, or of these the named ones, by name; the published first.

    Raises:
        ConfigError: this machine has none of a name.
    """
    found = {}
    if published_missing() is None:
        found["published"] = Method(partial(_by_layer, _published), True, _SINGLE)
    found["ours"] = Method(ours, False, _EXACT)
    found["svd_lowrank"] = Method(partial(_by_layer, _lowrank), True, {"largest": 1e-2})
    for driver in _DRIVERS if device.type == "cuda" else ():
        with contextlib.suppress(RuntimeError):
            torch.linalg.svd(torch.eye(2, device=device), driver=driver)
            found[driver] = Method(partial(_by_layer, partial(_full, driver)), True, _EXACT)
    for name in names:
        if name not in found:
            raise ConfigError(f"there is no method {name!r} here: give some of {list(found)}")
    return {name: method for name, method in found.items() if not names or name in names}


def published_missing() -> str | None:
    """Why PEFT's procedure cannot run here: it imports attrs, which PEFT does not depend on."""
    try:
        importlib.import_module("peft.tuners.lora.corda")
    except ImportError as error:
        return str(error)
    return None


def ours(case: Case, ends: Iterable[End]) -> Parts:
    """By `co_svd_layers`."""
    layers = partial(co_svd_layers, case.weights, case.covariances, rank=case.rank, damping=DAMPING)
    return {which: {name: Part(one.U) for name, one in layers(which=which)} for which in ends}


def _by_layer(
    decompose: Callable[[Tensor, Tensor, int], dict[End, Part]], case: Case, _: object
) -> Parts:
    """Layer by layer, all ends that `decompose` finds from W, C and the rank."""
    parts: Parts = {}
    for name, W in case.weights.items():
        for which, part in decompose(W, case.covariances[name], case.rank).items():
            parts.setdefault(which, {})[name] = part
    return parts


def _published(W: Tensor, C: Tensor, rank: int) -> dict[End, Part]:
    """PEFT's own: the inverse of C and a full SVD of W·C, in float32."""
    from peft.tuners.lora.corda import collect_eigens_for_layer

    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    linear.covariance_matrix = C
    found = collect_eigens_for_layer(linear, None)
    U, S, V = found.U_WC, found.S_WC.cpu()[:, None], found.V_WC
    ends: dict[End, slice] = {"largest": slice(rank), "smallest": slice(-rank, None)}
    return {
        which: Part(U[:, kept].clone(), S[kept] * V[:, kept].mT) for which, kept in ends.items()
    }


def _lowrank(W: Tensor, C: Tensor, rank: int) -> dict[End, Part]:
    """torch.svd_lowrank of W·C, in float32, with half as many vectors again and its two rounds."""
    M = W @ _damped(C)
    U = torch.svd_lowrank(M, min(rank + rank // 2, *M.shape))[0]
    return {"largest": Part(U[:, :rank])}


def _full(driver: str, W: Tensor, C: Tensor, rank: int) -> dict[End, Part]:
    """One of cuSOLVER's drivers on W·C in float64."""
    M = W.double() @ _damped(C.double())
    U, _, _ = torch.linalg.svd(M, full_matrices=False, driver=driver)
    return {"largest": Part(U[:, :rank].clone()), "smallest": Part(U[:, -rank:].clone())}


def _damped(C: Tensor) -> Tensor:
    diagonal = C.diagonal()
    return C + torch.diag((DAMPING * diagonal.mean()).expand(diagonal.shape))


@dataclass(frozen=True)
class Row:
    """One method at one end of one case.

    Attributes:
        case: its name.
        layers: how many there are.
        rank: number of components.
        which: the end.
        method: "published" is the baseline.
        error: the largest over the sampled layers: of B A relative to the reference's for the
            largest components, `tail_energy_ratio` for the smallest; None without a reference.
        passed: whether the error is small enough; the baseline is timed in any case.
        timing: seconds for all layers, both ends at once where the method yields both.
        speedup: baseline's median over this one's.
    """

    case: str
    layers: int
    rank: int
    which: End
    method: str
    error: float | None
    passed: bool
    timing: Timing | None = None
    speedup: float | None = None

    def line(self) -> str:
        """As printed below HEADER."""
        error = "not checked"
        if self.error is not None:
            # An energy of 1.0001 times the least possible is 1e-4 too much.
            largest = self.which == "largest"
            error = f"{self.error:.1e}" if largest else f"1 + {self.error - 1:.1e}"
        seconds = "" if self.timing is None else f"{self.timing.p50:.3f}"
        speedup = "" if self.speedup is None else f"{self.speedup:.2f}"
        return (
            f"{self.case:<13} {self.layers:>6} {self.rank:>4} {self.which:<8} {self.method:<11} "
            f"{seconds:>9} {speedup if seconds else 'no speed':>11} {error:>11}"
            f"{'' if self.passed else ' wrong'}"
        )


@torch.no_grad()
def bench_case(
    case: Case, contestants: Mapping[str, Method], *, exact: bool = False
) -> Iterator[Row]:
    """Yields the rows of the methods, the baseline's first if it is there.

    Each is warmed up on a small layer, and runs at least once.

    Args:
        case: see `make_case`.
        contestants: methods by name, the baseline first.
        exact: compare layers past 2048 channels with a float64 SVD, too, which takes minutes.

    Raises:
        ConfigError: a layer is too small for the rank.
    """
    device = next(iter(case.weights.values())).device
    for layer, weight in case.weights.items():
        if case.rank > min(weight.shape):
            raise ConfigError(
                f"rank {case.rank} is not possible for layer {layer} of {case.name} "
                f"({weight.shape[0]} × {weight.shape[1]}): choose a smaller --rank"
            )
    # First, so that nothing but what is timed runs in between.
    truths = references(case) if exact or case.quick else {}
    warm_up = make_case("smollm2-block", device, 8)
    base: float | None = None
    found: Parts = {}

    def run(asked: tuple[Method, list[End]]) -> None:
        found.update(asked[0].run(case, asked[1]))

    for name, method in contestants.items():
        method.run(warm_up, method.allowed)
        for ends in [[*method.allowed]] if method.at_once else [[end] for end in method.allowed]:
            timing = measure(run, [(method, ends)], device, repeats=1, warm_up=0)
            base = timing.p50 if name == BASELINE else base
            for which in ends:
                error = end_error(found[which], truths, which) if truths else None
                passed = error is None or error <= method.allowed[which]
                row = Row(case.name, len(case.weights), case.rank, which, name, error, passed)
                if passed or name == BASELINE:
                    row = replace(row, timing=timing, speedup=base / timing.p50 if base else None)
                yield row
            found.clear()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", help=f"by commas: {', '.join(CASES)}")
    parser.add_argument("--model", help="of the case model: a folder or hub id")
    parser.add_argument("--cov", help="its covariance file, from corda-kernels calibrate")
    parser.add_argument("--rank", type=int, help="by default 32, for LLaMA-2's shapes 128")
    parser.add_argument(
        "--methods",
        help="by commas: published (PEFT's), ours, svd_lowrank, on a GPU also torch's SVD drivers",
    )
    parser.add_argument(
        "--exact", action="store_true", help="check large layers against float64 too, in minutes"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write all results to")
    given = parser.parse_args()
    source = None if given.model is None or given.cov is None else (given.model, given.cov)
    default = f"{'smollm2-block' if given.model is None else 'model'},4096x4096"
    names, device = (given.cases or default).split(","), torch.device(given.device)
    try:
        chosen = methods(device, given.methods.split(",") if given.methods else [])
        for name in names:
            check_case(name, given.rank, source)
    except ConfigError as error:
        parser.error(str(error))
    found: dict[str, Any] = {"environment": environment(device), "rows": []}
    print(", ".join(f"{key} {value}" for key, value in found["environment"].items()))
    if missing := published_missing():
        print(f"without published: {missing}")
    print(HEADER)
    for name in names:
        for row in bench_case(
            make_case(name, device, given.rank, source), chosen, exact=given.exact
        ):
            print(row.line(), flush=True)
            found["rows"].append(asdict(row))
            if given.json:  # after every one, so that who stops it keeps them
                write_json(given.json, found)


if __name__ == "__main__":
    main()
