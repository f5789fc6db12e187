"""Covariances of a whole model, at once or block by block, whatever fits into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from corda_kernels.calibration import CalibrationCheckpoint, CovarianceSet
from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.blocks import calibrate_block_parts
from corda_kernels.calibration.distributed import Ranks, text_given
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import ConfigError
from corda_kernels.init.candidates import (
    GIVEN,
    calibrate_candidates,
    check_candidates,
    selected,
)
from corda_kernels.init.halves import (
    calibrate_halves,
    half_count,
    on_unseen,
    with_stability,
)
from corda_kernels.models import devices
from corda_kernels.outputs import format_bytes
from corda_kernels.planning import Selection
from corda_kernels.planning.compactness import Condition
from corda_kernels.planning.selection import Method
from corda_kernels.usage import Stopwatch


def covariance_stages(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "all-linear",
    rank: int | None = 32,
    ends: Sequence[str] = ("largest", "smallest"),
    damping: float | None = 0.01,
    candidates: int = 1,
    selection: Method = "argmin",
    condition: Condition = "ratio",
    domain: str = GIVEN,
    memory_limit: int | None = None,
    all_at_once: bool = False,
    checkpoint: CalibrationCheckpoint | None = None,
    distributed: bool = False,
    progress: bool = True,
    clock: Stopwatch | None = None,
) -> Iterator[CovarianceSet]:
    """Calibrates in one pass if all covariances fit into `memory_limit` bytes, else block by block.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`.
        targets: see `calibrate`.
        rank: see `calibrate_halves`; not looked at with several candidates.
        ends: see `calibrate_halves`.
        damping: see `calibrate_halves` and `calibrate_candidates`.
        candidates: from 2 on as `calibrate_candidates` does, in place of `calibrate_halves`.
        selection: see `calibrate_candidates`.
        condition: see `calibrate_candidates`.
        domain: see `calibrate_candidates`.
        memory_limit: in bytes; None for no limit. The covariances of both halves and their mean
            count, or two candidates.
        all_at_once: whether block by block will not do, since ranks are to depend on all layers.
        checkpoint: see `calibrate` and `calibrate_blocks`.
        distributed: see `calibrate`.
        progress: whether to show progress bars.
        clock: takes the time of the stages "calibration", "stability" and "selection".

    Yields:
        The covariances of all layers, or of each block in turn.

    Raises:
        ConfigError: there are fewer batches than candidates; or all covariances are needed at once
            but do not fit, or those of one block do not.
        CheckpointError: the checkpoint to go on from is damaged, or of another run.
        DistributedError: another rank has ended, or was given something else.
    """
    batches = list(batches)
    clock = clock or Stopwatch(devices(model))
    if candidates > 1:
        check_candidates(batches, candidates)
        parts, sets = candidates, 2
    else:
        parts = half_count(batches, rank, damping)
        sets = parts if parts == 1 else parts + 1
    judging: Any = {"rank": rank, "ends": ends, "damping": damping, "distributed": distributed}
    choosing: Any = {
        "selection": selection,
        "condition": condition,
        "damping": damping,
        "domain": domain,
        "distributed": distributed,
    }
    Ranks.of(distributed).agree(
        "covariance_stages",
        lambda: {
            **text_given(batches),
            **judging,
            **choosing,
            "candidates": candidates,
            "memory_limit": memory_limit,
            "all_at_once": all_at_once,
        },
    )
    needed = largest = 0
    if memory_limit is not None:
        needed, largest = (sets * size for size in covariance_bytes(model, targets))
    if memory_limit is None or needed <= memory_limit:
        options: Any = {
            "targets": targets,
            "checkpoint": checkpoint,
            "progress": progress,
            "clock": clock,
        }
        if candidates > 1:
            options |= choosing
            yield calibrate_candidates(model, batches, candidates=candidates, **options)
        else:
            yield calibrate_halves(model, batches, **options, **judging)
        return
    if all_at_once:
        raise ConfigError(
            "a budget is shared out by the spectra of all layers, which block by block are not at "
            f"hand at once: raise the memory limit to {needed} bytes ({format_bytes(needed)}), or "
            "give a rank instead"
        )
    if largest > memory_limit:
        raise ConfigError(
            f"the covariances of one decoder block take {largest} bytes ({format_bytes(largest)}), "
            f"and the memory limit is {memory_limit}: raise it to that"
            + (", or judge no stability, which takes a third of it" if sets == 3 else "")
        )
    blocks = calibrate_block_parts(
        model,
        batches,
        parts=parts,
        targets=targets,
        on_unseen="error" if candidates > 1 else on_unseen(parts),
        checkpoint=checkpoint,
        distributed=distributed,
        progress=progress,
    )
    for made in clock.each("calibration", blocks):
        if candidates > 1:
            made.reverse()  # the first one is taken off first
            with clock.stage("selection"):
                stage = selected(model, [made.pop] * parts, **choosing, progress=False)
        else:
            with clock.stage("stability"):
                stage = with_stability(model, made, **judging, progress=False)
            made.clear()
        yield stage
        del stage  # nothing of a block is left when the next one runs


def united_provenance(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The provenance of covariances that came in stages: notes by layer are of all layers."""
    united = dict(stages[0]) if stages else {}
    if united.get("stability"):
        layers: dict[str, Any] = {}
        for stage in stages:
            layers |= stage["stability"]["layers"]
        united["stability"] = united["stability"] | {"layers": layers}
    if "selection" in united:
        report, *others = [Selection.from_json(stage["selection"]) for stage in stages]
        for other in others:
            report = report.joined(other)
        united |= {"tokens": sum(report.tokens), "selection": report.to_json()}
    return united
