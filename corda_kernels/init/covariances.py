"""Text → the covariances that an adapter is made of: all at once or block by block, from the whole
text, from halves of it that show whether it was enough, or from candidates to select from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from corda_kernels.arguments import whole_number
from corda_kernels.calibration import CalibrationCheckpoint, CovarianceSet, calibrate
from corda_kernels.calibration.batches import Batch, token_count
from corda_kernels.calibration.blocks import calibrate_block_parts
from corda_kernels.calibration.distributed import Ranks, text_given
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.calibration.passes import OnUnseen, refuse_unseen, unseen
from corda_kernels.errors import (
    BatchError,
    ConfigError,
    LeftOutWarning,
    NonFiniteActivationError,
    PaddingWarning,
)
from corda_kernels.linalg.operand import check_damping
from corda_kernels.linears import weights_at_hand
from corda_kernels.models import devices
from corda_kernels.outputs import format_bytes
from corda_kernels.planning import (
    LayerStability,
    Selection,
    select_covariance,
    subspace_stability,
)
from corda_kernels.planning.scores import SCORING_DAMPING, Condition
from corda_kernels.planning.selection import Method
from corda_kernels.usage import Stopwatch

Maker = Callable[[], CovarianceSet]


@dataclass(frozen=True)
class CalibrationPlan:
    """How text becomes covariances.

    Attributes:
        targets: see `calibrate`.
        rank: of the subspaces to compare between two halves of the text, which every other batch
            belongs to; None for no comparison. Not looked at with several candidates.
        ends: of the spectrum to compare, "largest" and "smallest".
        damping: of the comparison and of the scores of candidates, which cannot do without and take
            0.01 then.
        candidates: from 2 on the batches are dealt out to so many, and every layer selects among
            them instead: candidate i takes batch i and every `candidates`-th after it.
        selection: see `select_covariance`.
        condition: see `select_covariance`.
        domain: what the batches are a sample of.
        memory_limit: in bytes; if the covariances take more, the model runs block by block. Those
            of both halves and their mean count, or two candidates. None for no limit.
        all_at_once: whether block by block will not do, since ranks are to depend on all layers.
        checkpoint: see `calibrate` and `calibrate_blocks`; each part of the text keeps its own.
        distributed: see `calibrate`; the ranks share the judging too.
        progress: whether to show progress bars.
    """

    targets: str | Sequence[str] = "all-linear"
    rank: int | None = None
    ends: Sequence[str] = ("largest", "smallest")
    damping: float | None = 0.01
    candidates: int = 1
    selection: Method = "argmin"
    condition: Condition = "ratio"
    domain: str = "the given batches"
    memory_limit: int | None = None
    all_at_once: bool = False
    checkpoint: CalibrationCheckpoint | None = None
    distributed: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        check_damping(self.damping)
        if self.rank is not None:
            whole_number("the rank at which stability is judged", self.rank, 1)

    def parts(self, batches: int) -> int:
        """Into how many parts so many batches are dealt out.

        Raises:
            ConfigError: there are fewer batches than candidates.
        """
        if self.candidates == 1:
            return 1 if self.rank is None or batches < 2 else 2
        if batches < self.candidates:
            raise ConfigError(
                f"{self.candidates} candidates need as many batches, got {batches}: use more "
                "samples, smaller batches or fewer candidates"
            )
        return self.candidates

    def sets(self, parts: int) -> int:
        """How many sets of covariances are held at once: two candidates, two halves and the sum."""
        return min(parts, 2) if self.candidates > 1 else 2 * parts - 1

    def on_unseen(self, parts: int) -> OnUnseen:
        """What a part does about layers that it does not reach.

        A half leaves them to the other one, such as an expert that few tokens are routed to.
        """
        return "skip" if self.candidates == 1 and parts > 1 else "error"

    def given(self) -> dict[str, object]:
        """What all ranks must be given alike, beside the text."""
        names = ("rank", "damping", "candidates", "selection", "condition", "domain")
        return {name: getattr(self, name) for name in (*names, "memory_limit", "all_at_once")} | {
            "ends": list(self.ends)
        }


def covariance_stages(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: CalibrationPlan,
    *,
    clock: Stopwatch | None = None,
) -> Iterator[CovarianceSet]:
    """Calibrates in one pass if all covariances fit into the memory limit, else block by block.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`.
        plan: how.
        clock: takes the time of the stages "calibration", "stability" and "selection".

    Yields:
        The covariances of all layers, or of each block in turn. Without candidates
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
    parts = plan.parts(len(batches))
    ranks = Ranks.of(plan.distributed)
    ranks.agree("covariance_stages", lambda: text_given(batches) | plan.given())
    if not _in_blocks(model, plan, plan.sets(parts)):
        kept = [None] * parts if plan.checkpoint is None else plan.checkpoint.parts(parts)

        def made(part: int) -> CovarianceSet:
            with clock.stage("calibration"):
                return _calibrate_part(model, batches, part, kept, plan)

        yield _united(model, [partial(made, part) for part in range(parts)], plan, clock)
        return
    blocks = calibrate_block_parts(
        model,
        batches,
        parts=parts,
        targets=plan.targets,
        on_unseen=plan.on_unseen(parts),
        checkpoint=plan.checkpoint,
        distributed=plan.distributed,
        progress=plan.progress,
    )
    for block in clock.each("calibration", blocks):
        block.reverse()  # the first one is taken off first
        makers = [block.pop] * parts
        stage = _united(model, makers, replace(plan, progress=False), clock)
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


def _in_blocks(model: nn.Module, plan: CalibrationPlan, sets: int) -> bool:
    """Whether so many sets of covariances exceed the limit, and those of one block do not."""
    limit = plan.memory_limit
    if limit is None:
        return False
    needed, largest = (sets * size for size in covariance_bytes(model, plan.targets))
    if needed <= limit:
        return False
    if plan.all_at_once:
        raise ConfigError(
            "a budget is shared out by the spectra of all layers, which block by block are not at "
            f"hand at once: raise the memory limit to {needed} bytes ({format_bytes(needed)}), or "
            "give a rank instead"
        )
    if largest > limit:
        raise ConfigError(
            f"the covariances of one decoder block take {largest} bytes ({format_bytes(largest)}), "
            f"and the memory limit is {limit}: raise it to that"
            + (", or judge no stability, which takes a third of it" if sets == 3 else "")
        )
    return True


def _calibrate_part(
    model: nn.Module,
    batches: Sequence[Batch],
    part: int,
    kept: Sequence[CalibrationCheckpoint | None],
    plan: CalibrationPlan,
) -> CovarianceSet:
    """Calibrates on batch `part` and every one after it that is as many further as there are parts.

    What the first part warned of the others do not say again; errors count in all batches.
    """
    parts = len(kept)
    try:
        with warnings.catch_warnings():
            if part:
                warnings.simplefilter("ignore", LeftOutWarning)
                warnings.simplefilter("ignore", PaddingWarning)
            return calibrate(
                model,
                batches[part::parts],
                targets=plan.targets,
                on_unseen=plan.on_unseen(parts),
                checkpoint=kept[part],
                distributed=plan.distributed,
                progress=plan.progress,
            )
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
    model: nn.Module, makers: Sequence[Maker], plan: CalibrationPlan, clock: Stopwatch
) -> CovarianceSet:
    """One set from the parts of a text: selected layer by layer, or summed and judged."""
    if plan.candidates == 1:
        halves = [make() for make in makers]
        with clock.stage("stability"):
            return _with_stability(model, halves, plan)

    def of_domain(make: Maker) -> CovarianceSet:
        made = make()
        made.provenance["domain"] = plan.domain
        return made

    with clock.stage("selection"):
        return select_covariance(
            model,
            (partial(of_domain, make) for make in makers),
            selection=plan.selection,
            damping=plan.damping or SCORING_DAMPING,
            condition=plan.condition,
            distributed=plan.distributed,
            progress=plan.progress,
        )


def _with_stability(
    model: nn.Module, halves: Sequence[CovarianceSet], plan: CalibrationPlan
) -> CovarianceSet:
    """The covariances of both halves, or of the only one, with a note on how well they agree.

    A layer that one half alone has reached gets its covariance from that, and an agreement of 0.

    Raises:
        CalibrationError: a layer was reached by neither half.
    """
    if plan.rank is None or len(halves) < 2:
        halves[0].provenance["stability"] = None
        return halves[0]
    first, second = halves
    refuse_unseen([name for name in unseen(first) if name in unseen(second)])
    ranks = Ranks.of(plan.distributed)
    modules = {name: model.get_submodule(name) for name in first if name in second}
    share = ranks.share_layers(modules)
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
    agreement = {
        name: layer
        for part in ranks.gather(stability.layers, "stability")
        for name, layer in part.items()
    }
    none = LayerStability(*(0.0 if end in plan.ends else None for end in ("largest", "smallest")))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    names = sorted({*first, *second}, key=lambda name: order.get(name, len(order)))
    stability = replace(stability, layers={name: agreement.get(name, none) for name in names})
    covariances = first.merge(second, names=names)
    covariances.provenance["stability"] = stability.to_json()
    return covariances
