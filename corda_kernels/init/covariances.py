"""Text → the covariances that an adapter is made of: all at once or block by block, from the whole
text, from halves of it that show whether it was enough, or from candidates to select from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import nn

from corda_kernels.calibration import CalibrationCheckpoint, CovarianceSet, calibrate
from corda_kernels.calibration.batches import Batch, token_count
from corda_kernels.calibration.blocks import calibrate_block_parts
from corda_kernels.calibration.distributed import Ranks, text_given
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.calibration.run import refuse_unseen, unseen
from corda_kernels.calibration.shrinkage import warn_unseen_experts
from corda_kernels.errors import (
    BatchError,
    ConfigError,
    LeftOutWarning,
    NonFiniteActivationError,
    PaddingWarning,
)
from corda_kernels.init.config import CalibrationPlan
from corda_kernels.linears import weights_at_hand
from corda_kernels.planning import LayerStability, Selection, select_covariance, subspace_stability
from corda_kernels.planning.scores import SCORING_DAMPING
from corda_kernels.planning.stability import AGREEMENT
from corda_kernels.structure import devices
from corda_kernels.usage import Stopwatch

DOMAIN = "the given batches"


def covariance_stages(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: CalibrationPlan,
    *,
    domain: str = DOMAIN,
    checkpoint: CalibrationCheckpoint | None = None,
    clock: Stopwatch | None = None,
) -> Iterator[CovarianceSet]:
    """Calibrates in one pass if all covariances fit into the memory limit, else block by block.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`.
        plan: how.
        domain: what the batches are a sample of.
        checkpoint: see `calibrate` and `calibrate_blocks`; each part of the text keeps its own.
        clock: takes the time of the stages "calibration", "stability" and "selection".

    Yields:
        The covariances of all layers, or of each block in turn, from the last one where gradients
        are taken. Without candidates
        `provenance["stability"]` tells how well both halves agree (see `Stability`), or is None
        where that was not asked for or there is but one batch.

    Raises:
        ConfigError: there are fewer batches than candidates; or all covariances are needed at once
            but do not fit, or those of one block do not.
        CalibrationError: see `calibrate`.
        CheckpointError: the checkpoint to go on from is damaged, or of another run.
        DistributedError: another rank has ended, or was given something else.
    """
    batches = list(batches)
    clock = clock or Stopwatch(devices(model))
    parts = plan.candidates
    if parts > max(len(batches), 1):
        raise ConfigError(
            f"{parts} candidates need as many batches, got {len(batches)}: use more samples, "
            "smaller batches or fewer candidates"
        )
    if parts == 1 and plan.stability and len(batches) > 1:
        parts = 2
    Ranks.of(plan.distributed).agree(
        "covariance_stages", lambda: text_given(batches) | plan.given() | {"domain": domain}
    )

    options: dict[str, Any] = {  # of either way to run the model
        "targets": plan.targets,
        "experts": plan.experts,
        # A half leaves layers that it does not reach to the other one, such as an expert that few
        # tokens are routed to.
        "on_unseen": "skip" if parts > 1 else "error",
        "distributed": plan.distributed,
        "progress": plan.progress,
        "sides": plan.sides,
        "labels": plan.labels,
    }
    if not _in_blocks(model, plan, parts):
        kept = [None] * parts if checkpoint is None else checkpoint.parts(parts)

        def made(part: int) -> CovarianceSet:
            with clock.stage("calibration"), _part_of(batches, part, parts) as of_part:
                return calibrate(model, of_part, checkpoint=kept[part], **options)

        yield _united(model, [partial(made, part) for part in range(parts)], plan, domain, clock)
        return
    blocks = calibrate_block_parts(model, batches, parts=parts, checkpoint=checkpoint, **options)
    quiet = replace(plan, progress=False)
    for block in clock.each("calibration", blocks):
        block.reverse()  # the first one is taken off first
        stage = _united(model, [block.pop] * parts, quiet, domain, clock)
        yield stage
        del stage  # nothing of a block is left when the next one runs


def united_provenance(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The provenance of covariances that came in stages: notes by layer are of all layers."""
    united = dict(stages[0]) if stages else {}
    if united.get("stability"):
        layers = {k: v for stage in stages for k, v in stage["stability"]["layers"].items()}
        united["stability"] = united["stability"] | {"layers": layers}
    if "selection" in united:
        report, *others = [Selection.from_json(stage["selection"]) for stage in stages]
        for other in others:
            report = report.joined(other)
        united |= {"tokens": sum(report.tokens), "selection": asdict(report)}
    return united


def _in_blocks(model: nn.Module, plan: CalibrationPlan, parts: int) -> bool:
    """Whether all covariances that are held at once exceed the limit, and those of a block do not.

    Those are of two candidates, or of both halves and their sum.
    """
    limit = plan.memory_limit
    if limit is None:
        return False
    sets = min(parts, 2) if plan.candidates > 1 else 2 * parts - 1
    sizes = covariance_bytes(model, plan.targets, plan.experts, plan.sides)
    needed, largest = (sets * size for size in sizes)
    if needed <= limit:
        return False
    if plan.all_at_once:
        raise ConfigError(
            "a budget needs the covariances of all layers at once: raise the memory limit to "
            f"{needed} bytes, or give a rank instead"
        )
    if largest > limit:
        less = ", or judge no stability, which takes a third of it" if sets == 3 else ""
        raise ConfigError(
            f"the covariances {'and gradients ' if plan.sides == 'both' else ''}of one decoder "
            f"block take {largest} bytes where the memory limit is {limit}: raise it to that{less}"
        )
    return True


@contextlib.contextmanager
def _part_of(batches: Sequence[Batch], part: int, parts: int) -> Iterator[Sequence[Batch]]:
    """Batch `part` and every one after it that is as many further as there are parts.

    What the first part warned of the others do not say again; errors count in all batches.
    """
    try:
        with warnings.catch_warnings():
            for category in (LeftOutWarning, PaddingWarning) if part else ():
                warnings.simplefilter("ignore", category)
            yield batches[part::parts]
    except BatchError as error:
        raise BatchError(parts * error.batch + part, error.reason) from error
    except NonFiniteActivationError as error:
        index = parts * error.batch + part
        before = sum(token_count(batch) for batch in batches[:index])
        tokens = (before, before + token_count(batches[index]))
        raise NonFiniteActivationError(
            error.layer, index, tokens, error.broken, error.channels
        ) from error


def _united(
    model: nn.Module,
    makers: Sequence[Callable[[], CovarianceSet]],
    plan: CalibrationPlan,
    domain: str,
    clock: Stopwatch,
) -> CovarianceSet:
    """One set from the parts of a text: selected layer by layer, or summed and judged."""
    if plan.candidates == 1:
        halves = [make() for make in makers]
        with clock.stage("stability"):
            return _with_stability(model, halves, plan)

    def candidate(make: Callable[[], CovarianceSet]) -> CovarianceSet:
        made = make()
        refuse_unseen(unseen(made))
        made.provenance["domain"] = domain
        return made

    with clock.stage("selection"):
        selected = select_covariance(
            model,
            (partial(candidate, make) for make in makers),
            selection=plan.selection,
            damping=plan.damping or SCORING_DAMPING,
            condition=plan.condition,
            distributed=plan.distributed,
            progress=plan.progress,
        )
    warn_unseen_experts(selected)
    return selected


def _with_stability(
    model: nn.Module, halves: Sequence[CovarianceSet], plan: CalibrationPlan
) -> CovarianceSet:
    """The covariances of both halves, or of the only one, with a note on how well they agree.

    A layer that one half alone has reached gets its covariance from that, and an agreement of 0.
    Experts are not judged.

    Raises:
        CalibrationError: a layer was reached by neither half.
    """
    if len(halves) < 2:
        halves[0].provenance["stability"] = None
        return halves[0]
    first, second = halves
    refuse_unseen([name for name in unseen(first) if name in unseen(second)])
    ranks = Ranks.of(plan.distributed)
    modules = dict(model.named_modules())
    share = ranks.share_layers({n: modules[n] for n in first if n in second and n in modules})
    with contextlib.ExitStack() as stack:
        for module in share.values():
            stack.enter_context(weights_at_hand(module))
        stability = subspace_stability(
            share,
            first,
            second,
            rank=plan.rank,
            damping=plan.damping,
            ends=plan.ends,
            progress=plan.progress and ranks.rank == 0,
        )
    parts = ranks.gather(stability.layers, "stability")
    agreement = {name: layer for part in parts for name, layer in part.items()}
    none = LayerStability(**{AGREEMENT[end]: 0.0 for end in plan.ends})
    layers = [name for name in modules if name in first or name in second]
    stability = replace(stability, layers={name: agreement.get(name, none) for name in layers})
    covariances = first.merge(second, names=list(dict.fromkeys([*layers, *first, *second])))
    warn_unseen_experts(covariances)
    covariances.provenance["stability"] = asdict(stability)
    return covariances
