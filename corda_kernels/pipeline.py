"""From a model and calibration text to an adapted model, in one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.calibration import CovarianceSet, calibrate
from corda_kernels.calibration.batches import token_count
from corda_kernels.decomposition import co_svd
from corda_kernels.errors import (
    ConfigError,
    CovarianceError,
    ModelError,
    NonFiniteActivationError,
    RankDeficientWarning,
    RankError,
)
from corda_kernels.initialization import (
    Adapter,
    AdapterRecord,
    LayerAdapter,
    adapter_factors,
    attach,
    describe_base,
    has_adapter,
    residual_marker,
)
from corda_kernels.initialization.factors import BALANCES, STEPS, Balance, Step
from corda_kernels.models import linear_weight, target_linears
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
    model: nn.Module, data: Iterable[Batch] | CovarianceSet, config: CordaConfig
) -> Adapter:
    """Makes the adapter of `init_corda` without attaching it; the model is left as it was."""
    modules = check_targets(model, config)
    covariances = data if isinstance(data, CovarianceSet) else calibrated(model, data, config)
    modules = _covered(modules, covariances)
    _warn_rank_deficient(covariances, config.damping)
    ranks, allocation = _planned_ranks(model, modules, covariances, config)
    modules = {name: module for name, module in modules.items() if ranks[name]}

    generators: dict[torch.device, torch.Generator] = {}
    layers: dict[str, LayerAdapter] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name in progress_bar(
        modules, description="decomposing", unit="layers", shown=config.progress
    ):
        weight = linear_weight(modules[name]).detach()
        device = weight.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(config.seed)
        part = co_svd(
            weight,
            covariances[name].matrix.to(device),
            rank=ranks[name],
            which=config.which,
            method=config.method,
            damping=config.damping,
            generator=generators[device],
        )
        factors = adapter_factors(weight, part, balance=config.balance, step=config.step)
        layers[name] = LayerAdapter.fresh(factors)
        notes[name] = {
            "rank": ranks[name],
            "scaling": factors.scaling,
            "tokens": covariances[name].tokens,
            "sigma_max": float(part.S[0]),
            "sigma_min": float(part.S[-1]),
            "residual": float(part.residual),
        }
    calibration = dict(covariances.provenance)
    record = AdapterRecord(
        mode=config.mode,
        rank=max(ranks.values()),
        balance=config.balance,
        step=config.step,
        residual=config.residual,
        damping=config.damping,
        base=describe_base(model, modules),
        stability=calibration.pop("stability", None) or {},
        calibration=calibration,
        layers=notes,
        allocation=allocation,
        versions=library_versions(),
    )
    adapter = Adapter(layers, record)
    record.initial_sha256 = adapter.initial_checksum()
    return adapter


def calibrated(
    model: nn.Module,
    batches: Iterable[Batch],
    config: CordaConfig,
    *,
    domain: str = "the given batches",
) -> CovarianceSet:
    """The covariances that an adapter is made of: those of all batches, or of the best candidates.

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
        return calibrate_candidates(
            model,
            batches,
            candidates=config.candidates,
            selection=config.selection,
            condition=config.condition,
            damping=config.damping,
            targets=config.targets,
            domain=domain,
            progress=config.progress,
        )
    return calibrate_halves(
        model,
        batches,
        targets=config.targets,
        rank=config.rank if config.stability else None,
        ends=(config.which,),
        damping=config.damping,
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
        progress=config.progress,
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


def calibrate_halves(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "all-linear",
    rank: int | None = 32,
    ends: Sequence[str] = ("largest", "smallest"),
    damping: float | None = 0.01,
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
        progress: whether to show progress bars.

    Returns:
        The covariances over all batches, with `provenance["stability"]` (see `Stability`), which
        is None where there was but one batch.
    """
    batches = list(batches)
    if rank is None or len(batches) < 2:
        covariances = calibrate(model, batches, targets=targets, progress=progress)
        covariances.provenance["stability"] = None
        return covariances
    first, second = (
        _calibrate_share(model, batches, half, 2, targets, progress) for half in range(2)
    )
    modules = {
        name: module
        for name, module in target_linears(model, targets).items()
        if name in first and name in second
    }
    stability = subspace_stability(
        modules,
        first,
        second,
        rank=rank,
        damping=damping,
        top="largest" in ends,
        bottom="smallest" in ends,
        progress=progress,
    )
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

    def candidate(index: int) -> CovarianceSet:
        made = _calibrate_share(model, batches, index, candidates, targets, progress)
        made.provenance["domain"] = domain
        return made

    return select_covariance(
        model,
        (partial(candidate, index) for index in range(candidates)),
        selection=selection,
        damping=damping or _SCORING_DAMPING,
        condition=condition,
        state=state,
        progress=progress,
    )


def _calibrate_share(
    model: nn.Module,
    batches: Sequence[Batch],
    share: int,
    shares: int,
    targets: str | Sequence[str],
    progress: bool,
) -> CovarianceSet:
    """Calibrates on every `shares`-th batch from `share` on; warns for the first share only."""
    try:
        with warnings.catch_warnings():
            if share:
                warnings.simplefilter("ignore")
            return calibrate(model, batches[share::shares], targets=targets, progress=progress)
    except NonFiniteActivationError as error:
        index = shares * error.batch + share
        before = sum(token_count(batch) for batch in batches[:index])
        tokens = (before, before + token_count(batches[index]))
        raise NonFiniteActivationError(
            error.layer, index, tokens, error.broken, error.channels
        ) from error


def _covered(modules: Mapping[str, nn.Module], covariances: CovarianceSet) -> dict[str, nn.Module]:
    """The modules that have a covariance of their size; those left out on purpose are dropped."""
    covered = {}
    for name, module in modules.items():
        if name in covariances:
            inputs = linear_weight(module).shape[1]
            channels = covariances[name].matrix.shape[0]
            if channels != inputs:
                raise CovarianceError(
                    f"layer {name} has {inputs} inputs, but its covariance {channels} channels: "
                    "the covariances were taken from another model"
                )
            covered[name] = module
        elif name not in covariances.left_out:
            raise CovarianceError(
                f"there is no covariance for layer {name}: calibrate the same model with the same "
                "targets, or leave the layer out of the targets"
            )
    if not covered:
        raise CovarianceError("the covariances cover none of the target layers")
    return covered


def _warn_rank_deficient(covariances: CovarianceSet, damping: float | None) -> None:
    short = {
        name: covariance
        for name, covariance in covariances.items()
        if covariance.tokens < covariance.matrix.shape[0]
    }
    if not short:
        return
    name, worst = max(short.items(), key=lambda item: item[1].matrix.shape[0])
    effect = (
        f"a damping of {damping:g} times the mean diagonal was added, which stands in for the "
        "directions that the text never touched"
        if damping
        else "without damping, directions that the text never touched are ordered by the weights"
    )
    warnings.warn(
        f"{len(short)} covariance(s) come from fewer tokens than channels and are singular, for "
        f"one {name} ({worst.tokens} tokens, {worst.matrix.shape[0]} channels): {effect}; use more "
        "samples or longer sequences",
        RankDeficientWarning,
        stacklevel=4,
    )
