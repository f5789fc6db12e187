"""Calibration on two halves of the text, which show whether it was enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from corda_kernels.arguments import whole_number
from corda_kernels.calibration import CalibrationCheckpoint, CovarianceSet
from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.distributed import Ranks, text_given
from corda_kernels.calibration.passes import OnUnseen, refuse_unseen, unseen
from corda_kernels.init.parts import calibrate_part
from corda_kernels.linalg.damping import check_damping
from corda_kernels.linears import weights_at_hand
from corda_kernels.models import devices
from corda_kernels.planning import LayerStability, subspace_stability
from corda_kernels.usage import Stopwatch


def calibrate_halves(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "all-linear",
    rank: int | None = 32,
    ends: Sequence[str] = ("largest", "smallest"),
    damping: float | None = 0.01,
    checkpoint: CalibrationCheckpoint | None = None,
    distributed: bool = False,
    progress: bool = True,
    clock: Stopwatch | None = None,
) -> CovarianceSet:
    """Calibrates and finds out on the way whether there were enough samples.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`; every other one belongs to the second half.
        targets: see `calibrate`.
        rank: of the subspaces to compare between the halves; None leaves the comparison out.
        ends: of the spectrum to compare, "largest" and "smallest".
        damping: of the comparison.
        checkpoint: see `calibrate`; each half keeps its own part of it.
        distributed: see `calibrate`.
        progress: whether to show progress bars.
        clock: takes the time of the stages "calibration" and "stability".

    Returns:
        The covariances over all batches, with `provenance["stability"]` (see `Stability`), which
        is None where there was but one batch.
    """
    batches = list(batches)
    count = half_count(batches, rank, damping)
    Ranks.of(distributed).agree(
        "calibrate_halves",
        lambda: {**text_given(batches), "rank": rank, "ends": list(ends), "damping": damping},
    )
    kept = [None] * count if checkpoint is None else checkpoint.parts(count)
    options: Any = {
        "targets": targets,
        "on_unseen": on_unseen(count),
        "distributed": distributed,
        "progress": progress,
    }
    clock = clock or Stopwatch(devices(model))
    with clock.stage("calibration"):
        halves = [
            calibrate_part(model, batches, half, count, checkpoint=kept[half], **options)
            for half in range(count)
        ]
    with clock.stage("stability"):
        return with_stability(
            model,
            halves,
            rank=rank,
            ends=ends,
            damping=damping,
            distributed=distributed,
            progress=progress,
        )


def half_count(batches: Sequence[Batch], rank: int | None, damping: float | None) -> int:
    """2, or 1 where the text cannot be halved, or its stability at `rank` is not asked for.

    Raises:
        ConfigError: the rank is below 1, or the damping is out of range.
    """
    check_damping(damping)
    if rank is not None:
        whole_number("the rank at which stability is judged", rank, 1)
    return 1 if rank is None or len(batches) < 2 else 2


def on_unseen(count: int) -> OnUnseen:
    """What calibration is to do about layers that one of `count` halves does not reach.

    It leaves them to the other, such as an expert that few tokens are routed to.
    """
    return "skip" if count > 1 else "error"


def with_stability(
    model: nn.Module,
    halves: Sequence[CovarianceSet],
    *,
    rank: int | None,
    ends: Sequence[str],
    damping: float | None,
    distributed: bool,
    progress: bool,
) -> CovarianceSet:
    """The covariances of both halves, or of the only one, with a note on how well they agree.

    A layer that one half alone has reached gets its covariance from that, and an agreement of 0.
    See `calibrate_halves`.

    Raises:
        CalibrationError: a layer was reached by neither half.
    """
    if rank is None or len(halves) < 2:
        halves[0].provenance["stability"] = None
        return halves[0]
    first, second = halves
    refuse_unseen([name for name in unseen(first) if name in unseen(second)])
    ranks = Ranks.of(distributed)
    modules = {name: model.get_submodule(name) for name in first if name in second}
    share = ranks.share_layers(modules)
    with contextlib.ExitStack() as stack:
        for module in share.values():
            stack.enter_context(weights_at_hand(module))
        stability = subspace_stability(
            share,
            first,
            second,
            rank=rank,
            damping=damping,
            top="largest" in ends,
            bottom="smallest" in ends,
            progress=progress and ranks.rank == 0,
        )
    agreement = {
        name: layer
        for part in ranks.gather(stability.layers, "stability")
        for name, layer in part.items()
    }
    none = LayerStability(*(0.0 if end in ends else None for end in ("largest", "smallest")))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    names = sorted({*first, *second}, key=lambda name: order.get(name, len(order)))
    stability = replace(stability, layers={name: agreement.get(name, none) for name in names})
    covariances = first.merge(second, names=names)
    covariances.provenance["stability"] = stability.to_json()
    return covariances
