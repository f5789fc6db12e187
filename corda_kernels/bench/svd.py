"""CO-SVD at both ends against the published procedure and what else torch offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from corda_kernels.bench.accuracy import Reference, adapter_error, reference, tail_energy_ratio
from corda_kernels.bench.svd_cases import DAMPING, Case, make_case
from corda_kernels.bench.svd_methods import End, Part, Parts, methods
from corda_kernels.bench.timing import Timing, measure
from corda_kernels.errors import ConfigError
from corda_kernels.linalg import parallel_map

# Up to this many rows or columns a float64 reference takes a second or less.
_QUICK = 2048
BASELINE = "published"


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

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@torch.no_grad()
def bench_case(
    case: Case, names: Sequence[str] | None = None, *, exact: bool = False
) -> Iterator[Row]:
    """Yields the rows of the methods named, or of all, the baseline's first.

    Each is warmed up on a small layer, and runs at least once.

    Args:
        case: see `make_case`.
        names: of the methods.
        exact: compare layers past 2048 channels with a float64 SVD, too, which takes minutes.

    Raises:
        ConfigError: there is no such method here, or a layer is too small for the rank.
    """
    device = next(iter(case.weights.values())).device
    check_methods(names or (), device)
    available = methods(device)
    for layer, weight in case.weights.items():
        if case.rank > min(weight.shape):
            raise ConfigError(
                f"rank {case.rank} is not possible for layer {layer} of {case.name} "
                f"({weight.shape[0]} × {weight.shape[1]}): choose a smaller --rank"
            )
    # First, so that nothing but what is timed runs in between.
    truths = references(case) if exact or _largest(case) <= _QUICK else {}
    warm_up = make_case("smollm2-block", device, 8)
    base: float | None = None
    for name, method in available.items():
        if names and name not in names:
            continue
        method.run(warm_up, method.ends)
        for ends in [method.ends] if method.at_once else [(which,) for which in method.ends]:
            kept: list[Parts] = []

            def run(ends: tuple[End, ...], kept: list[Parts] = kept) -> None:
                kept[:] = [method.run(case, ends)]  # noqa: B023 (runs before the next round)

            timing = measure(run, [ends], device, repeats=1, warm_up=0)
            if name == BASELINE:
                base = timing.p50
            for which in ends:
                error = end_error(kept[0][which], truths, which) if truths else None
                passed = error is None or error <= method.allowed[which]
                facts = (case.name, len(case.weights), case.rank, which, name, error, passed)
                if passed or name == BASELINE:
                    yield Row(*facts, timing, base / timing.p50 if base else None)
                else:
                    yield Row(*facts)


def check_methods(names: Sequence[str], device: torch.device) -> None:
    """Makes sure that this machine has these methods.

    Raises:
        ConfigError: it lacks one.
    """
    available = methods(device)
    for name in names:
        if name not in available:
            raise ConfigError(f"there is no method {name!r} here: give some of {list(available)}")


def _largest(case: Case) -> int:
    return max(max(weight.shape) for weight in case.weights.values())


def references(case: Case) -> dict[str, Reference]:
    """The sampled layers of a case, in float64, on the CPU."""

    def one(name: str) -> Reference:
        return reference(case.weights[name].cpu(), case.covariances[name].cpu(), DAMPING)

    workers = None if _largest(case) <= _QUICK else 1
    return dict(zip(case.sampled, parallel_map(one, case.sampled, workers=workers), strict=True))


def end_error(parts: dict[str, Part], truths: dict[str, Reference], which: End) -> float:
    """The largest error of one end over the layers in `truths`; see `Row.error`."""
    errors = []
    for name, truth in truths.items():
        U, A = parts[name].U.cpu().double(), parts[name].A
        if which == "smallest":
            errors.append(tail_energy_ratio(U, truth))
        else:
            BA = U @ (U.mT @ truth.W if A is None else A.cpu().double())
            errors.append(adapter_error(BA, truth, which, U.shape[-1]))
    return max(errors)
