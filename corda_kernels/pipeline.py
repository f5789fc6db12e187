"""From a model and calibration text to an adapted model, in one call."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.calibration import CalibrationCheckpoint, CovarianceSet, calibrate
from corda_kernels.calibration.batches import token_count
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.calibration.streaming import calibrate_block_parts
from corda_kernels.decomposition import CoSVD, co_svd
from corda_kernels.errors import (
    CheckpointError,
    ConfigError,
    CovarianceError,
    LeftOutWarning,
    ModelError,
    NonFiniteActivationError,
    OutOfMemoryWarning,
    PaddingWarning,
    RankDeficientWarning,
    RankError,
)
from corda_kernels.initialization import (
    Adapter,
    AdapterFactors,
    AdapterRecord,
    LayerAdapter,
    adapter_factors,
    attach,
    describe_base,
    has_adapter,
    residual_marker,
)
from corda_kernels.initialization.factors import BALANCES, STEPS, Balance, Step
from corda_kernels.models import linear_weight, target_linears, weights_at_hand
from corda_kernels.planning import (
    allocate_ranks,
    layer_spectra,
    parse_budget,
    select_covariance,
    subspace_stability,
    uniform_budget,
)
from corda_kernels.planning.compactness import CONDITIONS, Condition
from corda_kernels.planning.selection import METHODS, Method
from corda_kernels.progress import progress_bar
from corda_kernels.versions import library_versions

if TYPE_CHECKING:
    from peft import PeftModel

Batch = Tensor | Mapping[str, Any]

# Of scores where none is asked for: real covariances are singular to working precision.
_SCORING_DAMPING = 0.01


@dataclass(frozen=True)
class CordaConfig:
    """How to make an adapter.

    Attributes:
        mode: "kpm" trains the smallest components and calibrates on the knowledge to keep; "ipm"
            trains the largest and calibrates on the new task.
        rank: number of components of every layer; with a budget no more than the rank at which
            the stability is judged.
        budget: shares so many adapter parameters out over the layers instead: a number of them, a
            share of the model (0.01 or "1%"), or "r=128", what that rank would take in all layers.
        min_rank: what every layer gets at least of a budget.
        max_rank: what a layer gets at most of a budget; None for all it can have.
        rank_multiple: of which every rank under a budget is a multiple.
        candidates: into how many candidates to deal the batches out, one after the other in turn,
            each a sample of its own.
        selection: "argmin" keeps for each layer the candidate with the lowest score, as CorDA++
            does; "pool" takes all of them together. See `select_covariance`.
        condition: π in the scores of selection and budget; see `corda_kernels.compactness`.
        balance: "even" or "paper", how the factors share their magnitude; see `adapter_factors`.
        step: None, or "lora" for first optimiser steps of plain LoRA's size.
        residual: "pair" leaves the base untouched and subtracts the initial product beside it;
            "weight" writes W − B A into the base, as the paper does.
        damping: added to each covariance, times its mean diagonal; None for none. Scores cannot do
            without and take 0.01 then.
        targets: the layers; see `corda_kernels.models.target_linears`.
        method: of the decomposition; see `co_svd`.
        seed: of the randomised method.
        stability: whether to find out, where batches are given, if there were enough of them, by
            decomposing two halves of them as well; not with several candidates.
        memory_limit: of the covariances, in bytes; if all of them take more, the model is
            calibrated and decomposed block by block. None for no limit.
        distributed: whether the ranks of torch.distributed share the work; all of them are given
            the same model and batches, and end up with the same adapter.
        progress: whether to show progress bars.
    """

    mode: Literal["kpm", "ipm"]
    rank: int = 32
    budget: int | float | str | None = None
    min_rank: int = 0
    max_rank: int | None = None
    rank_multiple: int = 1
    candidates: int = 1
    selection: Method = "argmin"
    condition: Condition = "ratio"
    balance: Balance = "even"
    step: Step = None
    residual: Literal["pair", "weight"] = "pair"
    damping: float | None = 0.01
    targets: str | Sequence[str] = "all-linear"
    method: Literal["auto", "exact", "randomized"] = "auto"
    seed: int = 0
    stability: bool = True
    memory_limit: int | None = None
    distributed: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        for name, allowed in (
            ("mode", ("kpm", "ipm")),
            ("selection", METHODS),
            ("condition", CONDITIONS),
            ("balance", BALANCES),
            ("step", STEPS),
            ("residual", ("pair", "weight")),
            ("method", ("auto", "exact", "randomized")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.damping is not None and not 0 <= self.damping < float("inf"):
            raise ConfigError(f"damping must be at least 0 and finite, got {self.damping}")
        if self.candidates < 1:
            raise ConfigError(f"candidates must be at least 1, got {self.candidates}")
        whole = self.budget is not None or self.candidates > 1
        if self.memory_limit is not None and whole:
            raise ConfigError(
                "a budget and candidates need the covariances of all layers at once: leave the "
                "memory limit out, or calibrate first and give the covariances"
            )
        bounds = (self.min_rank, self.max_rank, self.rank_multiple)
        if self.budget is None and bounds != (0, None, 1):
            raise ConfigError(
                "min_rank, max_rank and rank_multiple bound the ranks under a budget: give one, "
                'such as budget="r=32"'
            )

    @property
    def which(self) -> Literal["largest", "smallest"]:
        """The end of the spectrum that the mode trains."""
        return "largest" if self.mode == "ipm" else "smallest"


def init_corda(
    model: nn.Module,
    data: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    *,
    use_peft: bool = True,
) -> PeftModel | nn.Module:
    """Initialises a CorDA adapter and attaches it, ready to train.

    At the start the adapted model computes what the base does.

    Args:
        model: a transformers model. With `residual="pair"` its weights stay as they are.
        data: calibration batches, see `calibrate`; or covariances.
        config: how.
        use_peft: False for CordaLinear layers in place of a PeftModel.

    Returns:
        A PeftModel with adapters `default` (trainable) and `corda_initial` (frozen); or, without
        PEFT, `model` with its layers replaced by CordaLinear.

    Raises:
        TargetError: no layer matches.
        RankError: a layer is too small for the rank; found before anything runs.
        CovarianceError: given covariances do not cover the layers, or have other sizes.
        CalibrationError: the forward passes gave no usable covariance for a layer.

    Source: CorDA (arXiv:2406.05223), algorithm 1.
    """
    adapter = corda_adapter(model, data, config)
    return attach(model, adapter, use_peft=use_peft)


def corda_adapter(
    model: nn.Module,
    data: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    *,
    domain: str = "the given batches",
) -> Adapter:
    """Makes the adapter of `init_corda` without attaching it; the model is left as it was.

    Args:
        model: see `init_corda`.
        data: see `init_corda`.
        config: see `init_corda`.
        domain: what batches are a sample of.
    """
    modules = check_targets(model, config)
    stages: Iterable[CovarianceSet]
    if isinstance(data, CovarianceSet):
        _check_complete(modules, data)
        stages = [data]
    else:
        stages = calibrated(model, data, config, domain=domain)
    peers = Ranks.of(config.distributed)
    allocation: dict[str, Any] = {}
    layers: dict[str, LayerAdapter] = {}
    notes: dict[str, dict[str, Any]] = {}
    provenances: list[dict[str, Any]] = []
    short: dict[str, tuple[int, int]] = {}
    for covariances in stages:
        short |= _rank_deficient(covariances)
        covered = _covered(modules, covariances)
        # Under a budget there is but one stage: its ranks depend on all layers.
        ranks, allocation = _planned_ranks(model, covered, covariances, config)
        mine = _shared(peers, {name: covered[name] for name in covered if ranks[name]})
        for made in peers.gather(_decompose(mine, covariances, ranks, config, peers)):
            layers |= {name: layer for name, (layer, _) in made.items()}
            notes |= {name: note for name, (_, note) in made.items()}
        provenances.append(covariances.provenance)
        del covariances  # before the next ones are made
    _warn_rank_deficient(short, config.damping)
    layers = {name: layers[name] for name in modules if name in layers}
    notes = {name: notes[name] for name in layers}
    calibration = united_provenance(provenances)
    record = AdapterRecord(
        mode=config.mode,
        rank=max(layer.rank for layer in layers.values()),
        balance=config.balance,
        step=config.step,
        residual=config.residual,
        damping=config.damping,
        base=describe_base(model, {name: modules[name] for name in layers}),
        stability=calibration.pop("stability", None) or {},
        calibration=calibration,
        layers=notes,
        allocation=allocation,
        versions=library_versions(),
    )
    adapter = Adapter(layers, record)
    record.initial_sha256 = adapter.initial_checksum()
    return adapter


def _shared(peers: Ranks, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """This rank's part of the modules, by what their decompositions cost."""
    costs = {name: math.prod(shape) * max(shape) for name, shape in _shapes(modules).items()}
    return {name: modules[name] for name in peers.share(costs)}


def _decompose(
    modules: Mapping[str, nn.Module],
    covariances: CovarianceSet,
    ranks: Mapping[str, int],
    config: CordaConfig,
    peers: Ranks,
) -> dict[str, tuple[LayerAdapter, dict[str, Any]]]:
    """The factors of every module, and what is to be noted of it."""
    made: dict[str, tuple[LayerAdapter, dict[str, Any]]] = {}
    for name in progress_bar(
        modules,
        description="decomposing",
        unit="layers",
        shown=config.progress and peers.rank == 0,
    ):
        with weights_at_hand(modules[name]):
            weight = linear_weight(modules[name]).detach()
            matrix = covariances[name].matrix
            job = partial(_decompose_layer, name, rank=ranks[name], config=config)
            try:
                part, factors = job(weight, matrix.to(weight.device))
            except torch.OutOfMemoryError:
                warnings.warn(
                    f"{weight.device} has too little memory to decompose layer {name}: the CPU "
                    "takes over",
                    OutOfMemoryWarning,
                    stacklevel=4,
                )
                part, factors = job(weight.cpu(), matrix.cpu())
        layer = LayerAdapter.fresh(factors)
        note = {
            "rank": ranks[name],
            "scaling": factors.scaling,
            "tokens": covariances[name].tokens,
            "sigma_max": float(part.S[0]),
            "sigma_min": float(part.S[-1]),
            "residual": float(part.residual),
        }
        made[name] = (layer.cpu() if peers.size > 1 else layer, note)
    return made


def _decompose_layer(
    name: str, weight: Tensor, matrix: Tensor, *, rank: int, config: CordaConfig
) -> tuple[CoSVD, AdapterFactors]:
    # Of its own for each layer, so that it does not matter which rank it falls to.
    generator = torch.Generator(weight.device)
    generator.manual_seed((config.seed + zlib.crc32(name.encode())) % 2**63)
    part = co_svd(
        weight,
        matrix,
        rank=rank,
        which=config.which,
        method=config.method,
        damping=config.damping,
        generator=generator,
    )
    return part, adapter_factors(weight, part, balance=config.balance, step=config.step)


def calibrated(
    model: nn.Module,
    batches: Iterable[Batch],
    config: CordaConfig,
    *,
    domain: str = "the given batches",
) -> Iterable[CovarianceSet]:
    """The covariances that an adapter is made of: those of all batches, or of the best candidates.

    They may come in stages, see `covariance_stages`.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`.
        config: its candidates, targets and so on.
        domain: what the batches are a sample of.

    Raises:
        ConfigError: there are fewer batches than candidates.
        CalibrationError: see `calibrate`.
    """
    if config.candidates > 1:
        chosen = calibrate_candidates(
            model,
            batches,
            candidates=config.candidates,
            selection=config.selection,
            condition=config.condition,
            damping=config.damping,
            targets=config.targets,
            domain=domain,
            distributed=config.distributed,
            progress=config.progress,
        )
        return [chosen]
    return covariance_stages(
        model,
        batches,
        targets=config.targets,
        rank=config.rank if config.stability else None,
        ends=(config.which,),
        damping=config.damping,
        memory_limit=config.memory_limit,
        distributed=config.distributed,
        progress=config.progress,
    )


def _planned_ranks(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    covariances: CovarianceSet,
    config: CordaConfig,
) -> tuple[dict[str, int], dict[str, Any]]:
    """The rank of each layer, and what to note of how a budget was shared out."""
    if config.budget is None:
        return dict.fromkeys(modules, config.rank), {}
    shapes = _shapes(modules)
    budget = adapter_parameters(model, modules, config)
    spectra = layer_spectra(
        modules,
        covariances,
        damping=config.damping or _SCORING_DAMPING,
        condition=config.condition,
        progress=config.progress and Ranks.of(config.distributed).rank == 0,
    )
    ranks = allocate_ranks(
        {name: spectrum.singular_values for name, spectrum in spectra.items()},
        {name: spectrum.log_condition for name, spectrum in spectra.items()},
        shapes,
        budget=budget,
        mode=config.mode,
        min_rank=config.min_rank,
        max_rank=config.max_rank,
        rank_multiple=config.rank_multiple,
    )
    spent = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    if not spent:
        raise RankError(
            f"a budget of {budget} adapter parameters does not pay for one component of the layer "
            "that is first in line: raise the budget, or write it as the rank it would hold in all "
            "layers (r=8)"
        )
    return ranks, {
        "budget": budget,
        "spent": spent,
        "condition": config.condition,
        "ranks": ranks,
    }


def adapter_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], config: CordaConfig
) -> int:
    """How many parameters an adapter of `modules` may have at most.

    Raises:
        ConfigError: the budget cannot be read.
    """
    if config.budget is None:
        return uniform_budget(_shapes(modules), config.rank)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return parse_budget(config.budget, _shapes(modules), whole)


def _shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """(out, in) of each layer."""
    shapes = {}
    for name, module in modules.items():
        outputs, inputs = linear_weight(module).shape
        shapes[name] = outputs, inputs
    return shapes


def check_targets(model: nn.Module, config: CordaConfig) -> dict[str, nn.Module]:
    """The layers that `config` selects, after a check of its rank or budget.

    Raises:
        TargetError: no layer matches, or one is quantised.
        ConfigError: the budget cannot be read.
        RankError: the rank is not possible for a layer.
        ModelError: the model carries an adapter already, or is the residual of one.
    """
    if has_adapter(model):
        raise ModelError(
            "the model carries an adapter already: load the base afresh, or merge the adapter"
        )
    if residual_marker(model) is not None:
        raise ModelError(
            "this model is the residual that an adapter left (see --save-base): load the "
            "untouched base"
        )
    modules = target_linears(model, config.targets)
    if config.budget is not None:
        adapter_parameters(model, modules, config)
        return modules
    for name, (outputs, inputs) in _shapes(modules).items():
        if not 1 <= config.rank <= min(outputs, inputs):
            raise RankError(
                f"rank {config.rank} is not possible for layer {name} ({outputs} × {inputs}): "
                f"choose one between 1 and {min(outputs, inputs)}, or leave the layer out"
            )
    return modules


def covariance_stages(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "all-linear",
    rank: int | None = 32,
    ends: Sequence[str] = ("largest", "smallest"),
    damping: float | None = 0.01,
    memory_limit: int | None = None,
    checkpoint: CalibrationCheckpoint | None = None,
    distributed: bool = False,
    progress: bool = True,
) -> Iterator[CovarianceSet]:
    """Calibrates in one pass if all covariances fit into `memory_limit` bytes, else block by block.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`.
        targets: see `calibrate`.
        rank: see `calibrate_halves`.
        ends: see `calibrate_halves`.
        damping: see `calibrate_halves`.
        memory_limit: in bytes; None for no limit. The covariances of both halves and their mean
            count.
        checkpoint: see `calibrate`; only one pass keeps its progress.
        distributed: see `calibrate`.
        progress: whether to show progress bars.

    Yields:
        The covariances of all layers, or of each block in turn, as from `calibrate_halves`.

    Raises:
        CheckpointError: a run is to be resumed, but goes block by block.
    """
    batches = list(batches)
    parts = _parts(batches, rank)
    sets = parts if parts == 1 else parts + 1
    if memory_limit is None or sets * covariance_bytes(model, targets) <= memory_limit:
        yield calibrate_halves(
            model,
            batches,
            targets=targets,
            rank=rank,
            ends=ends,
            damping=damping,
            checkpoint=checkpoint,
            distributed=distributed,
            progress=progress,
        )
        return
    if checkpoint is not None and checkpoint.resume and checkpoint.kept():
        raise CheckpointError(
            f"{checkpoint.kept()[0]} is of a run in one pass, but within the memory limit this one "
            "goes block by block: raise the limit, or delete the file and start again"
        )
    peers = Ranks.of(distributed)
    for halves in calibrate_block_parts(
        model, batches, parts=parts, targets=targets, distributed=distributed, progress=progress
    ):
        stage = _with_stability(model, halves, rank, ends, damping, peers, progress=False)
        halves.clear()
        yield stage
        del stage  # nothing of a block is left when the next one runs


def _parts(batches: Sequence[Batch], rank: int | None) -> int:
    """Into how many parts the text goes for the sake of its stability at that rank."""
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank at which stability is judged must be at least 1, got {rank}")
    return 1 if rank is None or len(batches) < 2 else 2


def united_provenance(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The provenance of covariances that came in stages: the stability is that of all layers."""
    united = dict(stages[0]) if stages else {}
    if united.get("stability"):
        layers: dict[str, Any] = {}
        for stage in stages:
            layers |= stage["stability"]["layers"]
        united["stability"] = united["stability"] | {"layers": layers}
    return united


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

    Returns:
        The covariances over all batches, with `provenance["stability"]` (see `Stability`), which
        is None where there was but one batch.
    """
    batches = list(batches)
    parts = _parts(batches, rank)
    kept = [None] * parts if checkpoint is None else checkpoint.parts(parts)
    peers = Ranks.of(distributed)
    options: Any = {"targets": targets, "distributed": distributed, "progress": progress}
    if parts == 1:
        whole = calibrate(model, batches, checkpoint=kept[0], **options)
        return _with_stability(model, [whole], rank, ends, damping, peers, progress)
    halves = [
        _calibrate_share(model, batches, half, 2, checkpoint=kept[half], **options)
        for half in range(2)
    ]
    return _with_stability(model, halves, rank, ends, damping, peers, progress)


def _with_stability(
    model: nn.Module,
    halves: Sequence[CovarianceSet],
    rank: int | None,
    ends: Sequence[str],
    damping: float | None,
    peers: Ranks,
    progress: bool,
) -> CovarianceSet:
    """The covariances of both halves, or of the only one, with a note on how well they agree."""
    if rank is None or len(halves) < 2:
        halves[0].provenance["stability"] = None
        return halves[0]
    first, second = halves
    modules = {name: model.get_submodule(name) for name in first if name in second}
    share = _shared(peers, modules)
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
            progress=progress and peers.rank == 0,
        )
    layers = {
        name: layer for part in peers.gather(stability.layers) for name, layer in part.items()
    }
    stability = replace(stability, layers={name: layers[name] for name in modules})
    covariances = first.merge(second)
    covariances.provenance["stability"] = stability.to_json()
    return covariances


def calibrate_candidates(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    candidates: int,
    selection: Method = "argmin",
    condition: Condition = "ratio",
    damping: float | None = _SCORING_DAMPING,
    targets: str | Sequence[str] = "all-linear",
    domain: str = "the given batches",
    state: str | os.PathLike[str] | None = None,
    distributed: bool = False,
    progress: bool = True,
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
        distributed: see `calibrate`.
        progress: whether to show progress bars.

    Raises:
        ConfigError: there are fewer batches than candidates.
        CalibrationError: see `calibrate`.
    """
    batches = list(batches)
    if len(batches) < candidates:
        raise ConfigError(
            f"{candidates} candidates need as many batches, got {len(batches)}: use more samples, "
            "smaller batches or fewer candidates"
        )

    options: Any = {"targets": targets, "distributed": distributed, "progress": progress}

    def candidate(index: int) -> CovarianceSet:
        made = _calibrate_share(model, batches, index, candidates, **options)
        made.provenance["domain"] = domain
        return made

    return select_covariance(
        model,
        (partial(candidate, index) for index in range(candidates)),
        selection=selection,
        damping=damping or _SCORING_DAMPING,
        condition=condition,
        state=state,
        progress=progress and Ranks.of(distributed).rank == 0,
    )


def _calibrate_share(
    model: nn.Module,
    batches: Sequence[Batch],
    share: int,
    shares: int,
    **options: Any,
) -> CovarianceSet:
    """Calibrates on every `shares`-th batch from `share` on; warns for the first share only."""
    try:
        with warnings.catch_warnings():
            if share:
                # What the first share warned of need not be said again.
                warnings.simplefilter("ignore", LeftOutWarning)
                warnings.simplefilter("ignore", PaddingWarning)
            return calibrate(model, batches[share::shares], **options)
    except NonFiniteActivationError as error:
        index = shares * error.batch + share
        before = sum(token_count(batch) for batch in batches[:index])
        tokens = (before, before + token_count(batches[index]))
        raise NonFiniteActivationError(
            error.layer, index, tokens, error.broken, error.channels
        ) from error


def _covered(modules: Mapping[str, nn.Module], covariances: CovarianceSet) -> dict[str, nn.Module]:
    """The modules that have a covariance in the set, after a check that it is of their size."""
    covered = {name: module for name, module in modules.items() if name in covariances}
    for name, module in covered.items():
        inputs = linear_weight(module).shape[1]
        channels = covariances[name].matrix.shape[0]
        if channels != inputs:
            raise CovarianceError(
                f"layer {name} has {inputs} inputs, but its covariance {channels} channels: "
                "the covariances were taken from another model"
            )
    return covered


def _check_complete(modules: Mapping[str, nn.Module], covariances: CovarianceSet) -> None:
    """Makes sure that a set covers all modules but those that were left out on purpose."""
    for name in modules:
        if name not in covariances and name not in covariances.left_out:
            raise CovarianceError(
                f"there is no covariance for layer {name}: calibrate the same model with the same "
                "targets, or leave the layer out of the targets"
            )
    if modules.keys().isdisjoint(covariances):
        raise CovarianceError("the covariances cover none of the target layers")


def _rank_deficient(covariances: CovarianceSet) -> dict[str, tuple[int, int]]:
    """Tokens and channels of each layer whose covariance is singular, having fewer tokens."""
    return {
        name: (covariance.tokens, covariance.matrix.shape[0])
        for name, covariance in covariances.items()
        if covariance.tokens < covariance.matrix.shape[0]
    }


def _warn_rank_deficient(short: Mapping[str, tuple[int, int]], damping: float | None) -> None:
    if not short:
        return
    name, (tokens, channels) = max(short.items(), key=lambda item: item[1][1])
    effect = (
        f"a damping of {damping:g} times the mean diagonal was added, which stands in for the "
        "directions that the text never touched"
        if damping
        else "without damping, directions that the text never touched are ordered by the weights"
    )
    warnings.warn(
        f"{len(short)} covariance(s) come from fewer tokens than channels and are singular, for "
        f"one {name} ({tokens} tokens, {channels} channels): {effect}; use more "
        "samples or longer sequences",
        RankDeficientWarning,
        stacklevel=4,
    )
