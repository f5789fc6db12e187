"""From a model and calibration text to an adapted model, in one call."""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
        memory_limit: of the covariances, in bytes; if all of them take more, the model is
            calibrated and decomposed block by block. None for no limit.
        distributed: whether the ranks of torch.distributed share the work; all of them are given
            the same model and batches, and end up with the same adapter.
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
    memory_limit: int | None = None
    distributed: bool = False
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
    stages: Iterable[CovarianceSet]
    if isinstance(data, CovarianceSet):
        _check_complete(modules, data)
        stages = [data]
    else:
        stages = covariance_stages(
            model,
            data,
            targets=config.targets,
            rank=config.rank if config.stability else None,
            ends=(config.which,),
            damping=config.damping,
            memory_limit=config.memory_limit,
            distributed=config.distributed,
            progress=config.progress,
        )
    ranks = Ranks.of(config.distributed)
    layers: dict[str, LayerAdapter] = {}
    notes: dict[str, dict[str, Any]] = {}
    provenances: list[dict[str, Any]] = []
    short: dict[str, tuple[int, int]] = {}
    for covariances in stages:
        short |= _rank_deficient(covariances)
        covered = _covered(modules, covariances)
        for made in ranks.gather(_decompose(_shared(ranks, covered), covariances, config, ranks)):
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
        rank=config.rank,
        balance=config.balance,
        step=config.step,
        residual=config.residual,
        damping=config.damping,
        base=describe_base(model, {name: modules[name] for name in layers}),
        stability=calibration.pop("stability", None) or {},
        calibration=calibration,
        layers=notes,
        versions=library_versions(),
    )
    adapter = Adapter(layers, record)
    record.initial_sha256 = adapter.initial_checksum()
    return adapter


def _shared(ranks: Ranks, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """This rank's part of the modules, by what their decompositions cost."""
    shapes = {name: linear_weight(module).shape for name, module in modules.items()}
    costs = {name: math.prod(shape) * max(shape) for name, shape in shapes.items()}
    return {name: modules[name] for name in ranks.share(costs)}


def _decompose(
    modules: Mapping[str, nn.Module], covariances: CovarianceSet, config: CordaConfig, ranks: Ranks
) -> dict[str, tuple[LayerAdapter, dict[str, Any]]]:
    """The factors of every module, and what is to be noted of it."""
    made: dict[str, tuple[LayerAdapter, dict[str, Any]]] = {}
    for name in progress_bar(
        modules,
        description="decomposing",
        unit="layers",
        shown=config.progress and ranks.rank == 0,
    ):
        with weights_at_hand(modules[name]):
            weight = linear_weight(modules[name]).detach()
            matrix = covariances[name].matrix
            try:
                part, factors = _decompose_layer(name, weight, matrix.to(weight.device), config)
            except torch.OutOfMemoryError:
                warnings.warn(
                    f"{weight.device} has too little memory to decompose layer {name}: the CPU "
                    "takes over",
                    OutOfMemoryWarning,
                    stacklevel=4,
                )
                part, factors = _decompose_layer(name, weight.cpu(), matrix.cpu(), config)
        layer = LayerAdapter.fresh(factors)
        note = {
            "rank": config.rank,
            "scaling": factors.scaling,
            "tokens": covariances[name].tokens,
            "sigma_max": float(part.S[0]),
            "sigma_min": float(part.S[-1]),
            "residual": float(part.residual),
        }
        made[name] = (layer.cpu() if ranks.size > 1 else layer, note)
    return made


def _decompose_layer(
    name: str, weight: Tensor, matrix: Tensor, config: CordaConfig
) -> tuple[CoSVD, AdapterFactors]:
    # Of its own for each layer, so that it does not matter which rank it falls to.
    generator = torch.Generator(weight.device)
    generator.manual_seed((config.seed + zlib.crc32(name.encode())) % 2**63)
    part = co_svd(
        weight,
        matrix,
        rank=config.rank,
        which=config.which,
        method=config.method,
        damping=config.damping,
        generator=generator,
    )
    return part, adapter_factors(weight, part, balance=config.balance, step=config.step)


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
    ranks = Ranks.of(distributed)
    for halves in calibrate_block_parts(
        model, batches, parts=parts, targets=targets, distributed=distributed, progress=progress
    ):
        stage = _with_stability(model, halves, rank, ends, damping, ranks, progress=False)
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
    ranks = Ranks.of(distributed)
    options: Any = {"targets": targets, "distributed": distributed, "progress": progress}
    if parts == 1:
        whole = calibrate(model, batches, checkpoint=kept[0], **options)
        return _with_stability(model, [whole], rank, ends, damping, ranks, progress)
    first = _calibrate_half(model, batches, 0, checkpoint=kept[0], **options)
    with warnings.catch_warnings():
        # What the first half warned of need not be said again.
        warnings.simplefilter("ignore", LeftOutWarning)
        warnings.simplefilter("ignore", PaddingWarning)
        second = _calibrate_half(model, batches, 1, checkpoint=kept[1], **options)
    return _with_stability(model, [first, second], rank, ends, damping, ranks, progress)


def _with_stability(
    model: nn.Module,
    halves: Sequence[CovarianceSet],
    rank: int | None,
    ends: Sequence[str],
    damping: float | None,
    ranks: Ranks,
    progress: bool,
) -> CovarianceSet:
    """The covariances of both halves, or of the only one, with a note on how well they agree."""
    if rank is None or len(halves) < 2:
        halves[0].provenance["stability"] = None
        return halves[0]
    first, second = halves
    modules = {name: model.get_submodule(name) for name in first if name in second}
    share = _shared(ranks, modules)
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
    layers = {
        name: layer for part in ranks.gather(stability.layers) for name, layer in part.items()
    }
    stability = replace(stability, layers={name: layers[name] for name in modules})
    covariances = first.merge(second)
    covariances.provenance["stability"] = stability.to_json()
    return covariances


def _calibrate_half(
    model: nn.Module, batches: Sequence[Batch], half: int, **options: Any
) -> CovarianceSet:
    try:
        return calibrate(model, batches[half::2], **options)
    except NonFiniteActivationError as error:
        index = 2 * error.batch + half
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
