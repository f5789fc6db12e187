"""Calibration on several samples of the text, among which every layer chooses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from corda_kernels.calibration import CalibrationCheckpoint, CovarianceSet
from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.distributed import Ranks, text_given
from corda_kernels.errors import ConfigError
from corda_kernels.init.parts import calibrate_part
from corda_kernels.models import devices
from corda_kernels.planning import select_covariance
from corda_kernels.planning.compactness import SCORING_DAMPING, Condition
from corda_kernels.planning.selection import Method
from corda_kernels.usage import Stopwatch

# What candidates are a sample of where their maker has no name for it.
GIVEN = "the given batches"


def calibrate_candidates(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    candidates: int,
    selection: Method = "argmin",
    condition: Condition = "ratio",
    damping: float | None = SCORING_DAMPING,
    targets: str | Sequence[str] = "all-linear",
    domain: str = GIVEN,
    state: str | os.PathLike[str] | None = None,
    checkpoint: CalibrationCheckpoint | None = None,
    distributed: bool = False,
    progress: bool = True,
    clock: Stopwatch | None = None,
) -> CovarianceSet:
    """Deals batches out to candidates and selects among those; see `select_covariance`.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`; candidate i takes batch i and every `candidates`-th after it.
        candidates: how many.
        selection: see `select_covariance`.
        condition: see `select_covariance`.
        damping: see `select_covariance`; without any the scores take 0.01.
        targets: see `calibrate`.
        domain: what the batches are a sample of.
        state: see `select_covariance`.
        checkpoint: see `calibrate`; each candidate keeps its own part of it.
        distributed: see `calibrate`; the ranks share the scoring too.
        progress: whether to show progress bars.
        clock: takes the time of the stages "calibration" and "selection".

    Raises:
        ConfigError: there are fewer batches than candidates.
        CalibrationError: see `calibrate`.
    """
    batches = list(batches)
    check_candidates(batches, candidates)
    Ranks.of(distributed).agree(
        "calibrate_candidates",
        lambda: {**text_given(batches), "candidates": candidates, "domain": domain},
    )
    kept = [None] * candidates if checkpoint is None else checkpoint.parts(candidates)
    clock = clock or Stopwatch(devices(model))

    def candidate(index: int) -> CovarianceSet:
        with clock.stage("calibration"):
            return calibrate_part(
                model,
                batches,
                index,
                candidates,
                targets=targets,
                checkpoint=kept[index],
                distributed=distributed,
                progress=progress,
            )

    with clock.stage("selection"):
        return selected(
            model,
            (partial(candidate, index) for index in range(candidates)),
            selection=selection,
            condition=condition,
            damping=damping,
            domain=domain,
            state=state,
            distributed=distributed,
            progress=progress,
        )


def check_candidates(batches: Sequence[Batch], candidates: int) -> None:
    """Makes sure that every candidate has text.

    Raises:
        ConfigError: there are fewer batches than candidates.
    """
    if len(batches) < candidates:
        raise ConfigError(
            f"{candidates} candidates need as many batches, got {len(batches)}: use more samples, "
            "smaller batches or fewer candidates"
        )


def selected(
    model: nn.Module,
    makers: Iterable[Callable[[], CovarianceSet]],
    *,
    selection: Method,
    condition: Condition,
    damping: float | None,
    domain: str,
    state: str | os.PathLike[str] | None = None,
    distributed: bool,
    progress: bool,
) -> CovarianceSet:
    """Selects among samples of one text, each made when it is its turn.

    See `calibrate_candidates`.
    """

    def of_domain(make: Callable[[], CovarianceSet]) -> CovarianceSet:
        made = make()
        made.provenance["domain"] = domain
        return made

    return select_covariance(
        model,
        (partial(of_domain, make) for make in makers),
        selection=selection,
        damping=damping or SCORING_DAMPING,
        condition=condition,
        state=state,
        distributed=distributed,
        progress=progress,
    )
