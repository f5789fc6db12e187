"""From a model and calibration text to an adapted model, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from corda_kernels.planning import subspace_stability
from corda_kernels.progress import progress_bar
from corda_kernels.versions import library_versions

if TYPE_CHECKING:
    from peft import PeftModel

Batch = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class CordaConfig:
    """How to make an adapter.

    Attributes:
        mode: "kpm" trains the smallest components and calibrates on the knowledge to keep; "ipm"
            trains the largest and calibrates on the new task.
        rank: number of components of every layer.
        balance: "even" or "paper", how the factors share their magnitude; see `adapter_factors`.
        step: None, or "lora" for first optimiser steps of plain LoRA's size.
        residual: "pair" leaves the base untouched and subtracts the initial product beside it;
            "weight" writes W − B A into the base, as the paper does.
        damping: added to each covariance, times its mean diagonal; None for none.
        targets: the layers; see `corda_kernels.models.target_linears`.
        method: of the decomposition; see `co_svd`.
        seed: of the randomised method.
        stability: whether to find out, where batches are given, if there were enough of them, by
            decomposing two halves of them as well.
        progress: whether to show progress bars.
    """

    mode: Literal["kpm", "ipm"]
    rank: int = 32
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
    if isinstance(data, CovarianceSet):
        covariances = data
    else:
        covariances = calibrate_halves(
            model,
            data,
            targets=config.targets,
            rank=config.rank if config.stability else None,
            ends=(config.which,),
            damping=config.damping,
            progress=config.progress,
        )
    modules = _covered(modules, covariances)
    _warn_rank_deficient(covariances, config.damping)

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
            rank=config.rank,
            which=config.which,
            method=config.method,
            damping=config.damping,
            generator=generators[device],
        )
        factors = adapter_factors(weight, part, balance=config.balance, step=config.step)
        layers[name] = LayerAdapter.fresh(factors)
        notes[name] = {
            "rank": config.rank,
            "scaling": factors.scaling,
            "tokens": covariances[name].tokens,
            "sigma_max": float(part.S[0]),
            "sigma_min": float(part.S[-1]),
            "residual": float(part.residual),
        }
    calibration = dict(covariances.provenance)
    record = AdapterRecord(
        mode=config.mode,
        rank=config.rank,
        balance=config.balance,
        step=config.step,
        residual=config.residual,
        damping=config.damping,
        base=describe_base(model, modules),
        stability=calibration.pop("stability", None) or {},
        calibration=calibration,
        layers=notes,
        versions=library_versions(),
    )
    adapter = Adapter(layers, record)
    record.initial_sha256 = adapter.initial_checksum()
    return adapter


def check_targets(model: nn.Module, config: CordaConfig) -> dict[str, nn.Module]:
    """The layers that `config` selects, after a check that each can be given its rank.

    Raises:
        TargetError: no layer matches, or one is quantised.
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
    for name, module in modules.items():
        outputs, inputs = linear_weight(module).shape
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
    first = _calibrate_half(model, batches, 0, targets, progress)
    with warnings.catch_warnings():
        # What the first half warned of need not be said again.
        warnings.simplefilter("ignore")
        second = _calibrate_half(model, batches, 1, targets, progress)
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


def _calibrate_half(
    model: nn.Module,
    batches: Sequence[Batch],
    half: int,
    targets: str | Sequence[str],
    progress: bool,
) -> CovarianceSet:
    try:
        return calibrate(model, batches[half::2], targets=targets, progress=progress)
    except NonFiniteActivationError as error:
        index = 2 * error.batch + half
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
