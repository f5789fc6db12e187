"""The one call: an adapter for a model from calibration text or covariances."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from corda_kernels.adapter import (
    Adapter,
    AdapterRecord,
    LayerAdapter,
    attach,
    check_at_hand,
    describe_base,
    has_adapter,
    not_selectable,
    residual_marker,
)
from corda_kernels.arguments import flag, instance_of
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.distributed import Ranks, covariances_given, layers_given
from corda_kernels.errors import (
    CalibrationError,
    ConfigError,
    CovarianceError,
    LeftOutWarning,
    ModelError,
    RankDeficientWarning,
    RankError,
    TargetError,
)
from corda_kernels.init.budget import adapter_parameters, layer_shapes, planned_ranks
from corda_kernels.init.candidates import GIVEN
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.layers import layer_adapters
from corda_kernels.init.measured import measured_input, measured_layers, measured_run
from corda_kernels.init.stages import covariance_stages, united_provenance
from corda_kernels.linears import check_writable, linear_shape, unpack
from corda_kernels.models import (
    check_unshared,
    check_unwrapped,
    devices,
    target_linears,
    unreached_weights,
)
from corda_kernels.planning import Stability
from corda_kernels.planning.ranks import check_guaranteed
from corda_kernels.usage import Stopwatch
from corda_kernels.versions import library_versions

if TYPE_CHECKING:
    from peft import PeftModel


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
        model: a transformers model. Its weights stay as they are, but for `residual="weight"`.
        data: calibration batches, see `calibrate`; or covariances.
        config: how.
        use_peft: False for CordaLinear layers in place of a PeftModel.

    Returns:
        A stock PeftModel with one LoRA of twice the rank, all of it to be trained; or, without
        PEFT, `model` with its layers replaced by CordaLinear.

    Raises:
        TargetError: no layer matches.
        RankError: a layer is too small for the rank, found before anything runs; or a budget does
            not pay for a single component.
        ConfigError: the budget cannot be read, or all covariances that it needs do not fit into the
            memory limit; or there are fewer batches than candidates; or an option needs PEFT.
        CovarianceError: given covariances do not cover the layers, or have other sizes.
        CalibrationError: the forward passes gave no usable covariance for a layer.
        AdapterError: weights are offloaded, found before anything runs.
        DistributedError: another rank has ended, or was given something else.

    Source: CorDA (arXiv:2406.05223), algorithm 1.
    """
    _check_kinds(data, config)
    flag("use_peft", use_peft)
    if config.lora and not use_peft:
        raise ConfigError(f"{min(config.lora)} is an option of PEFT: it needs use_peft=True")
    check_at_hand(check_targets(model, config, use_peft=use_peft))
    Ranks.of(config.distributed).agree("init_corda", lambda: {"use_peft": use_peft})
    adapter = corda_adapter(model, data, config, use_peft=use_peft)
    return attach(model, adapter, use_peft=use_peft, copy=False)


def corda_adapter(
    model: nn.Module,
    data: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    *,
    domain: str = GIVEN,
    use_peft: bool = True,
) -> Adapter:
    """Makes the adapter of `init_corda` without attaching it; the model is left as it was.

    Args:
        model: see `init_corda`.
        data: see `init_corda`.
        config: see `init_corda`.
        domain: what the batches are a sample of.
        use_peft: whether it is to be attached by PEFT, which cannot adapt every layer.

    Raises:
        CordaError: see `init_corda`.
    """
    _check_kinds(data, config)
    modules = check_targets(model, config, use_peft=use_peft)
    _warn_left_out(model, config, modules)
    unpack(modules)
    ranks = Ranks.of(config.distributed)
    ranks.agree("corda_adapter", lambda: _given(model, modules, data, config, domain))
    layers: dict[str, LayerAdapter] = {}
    notes: dict[str, dict[str, Any]] = {}
    allocation: dict[str, Any] = {}
    provenances: list[dict[str, Any]] = []
    short: dict[str, tuple[int, int]] = {}
    measured: dict[str, dict[str, Any]] = {}
    inputs: list[dict[str, Any]] = []
    clock = Stopwatch(devices(model))
    for covariances in _stages(model, modules, data, config, domain, clock):
        covered = _covered(modules, covariances)
        short |= _rank_deficient(covered, covariances)
        planned, allocation, spectra = planned_ranks(model, covered, covariances, config, clock)
        adapted = {name: module for name, module in covered.items() if planned[name]}
        share = ranks.share_layers(adapted)
        with clock.stage("decomposition"):
            found = layer_adapters(
                share, covariances, planned, config, progress=config.progress and ranks.rank == 0
            )
            if ranks.size > 1:
                host = torch.device("cpu")
                found = {
                    name: (layer.to(host), note, part)
                    for name, (layer, note, part) in found.items()
                }
            parts: dict[str, dict[str, Any]] = {}
            for made in ranks.gather(found, "decompositions"):
                layers |= {name: layer for name, (layer, _, _) in made.items()}
                notes |= {name: note for name, (_, note, _) in made.items()}
                parts |= {name: part for name, (_, _, part) in made.items()}
        measured |= measured_layers(layer_shapes(covered), parts, spectra, config.condition)
        inputs += [measured_input(covariance, names) for covariance, names in covariances.groups()]
        provenances.append(covariances.provenance)
        del covariances  # before the next ones are made
    _warn_rank_deficient(short, config.damping)
    layers = {name: layers[name] for name in modules if name in layers}
    calibration = united_provenance(provenances)
    stability = calibration.pop("stability", None)
    if stability:
        # A covariance file may know of other layers, and of the end that is not trained.
        judged = Stability.from_json(stability).at(config.which, layers)
        stability = None if judged is None else judged.to_json()
    record = AdapterRecord(
        mode=config.mode,
        rank=max(note["rank"] for note in notes.values()),
        hold=None if config.residual else config.hold,
        residual=config.residual,
        damping=config.damping,
        base=describe_base(model, {name: modules[name] for name in layers}),
        stability=stability or {},
        calibration=calibration,
        layers={name: notes[name] for name in layers},
        allocation=allocation,
        measured=measured_run(measured, inputs, clock),
        versions=library_versions(),
        lora=config.lora,
    )
    return Adapter(layers, record)


def _given(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    domain: str,
) -> dict[str, object]:
    """What all ranks must be given alike; batches are compared where they are run."""
    options = asdict(config)
    for name in ("targets", "exclude_modules", "progress"):
        del options[name]
    if isinstance(data, CovarianceSet):
        about = {"data": "covariances", **covariances_given(data)}
    else:
        about = {"data": "batches", "domain": domain}
    return {**layers_given({"": model}, modules), **about, **options}


def _check_kinds(data: object, config: object) -> None:
    instance_of("config", config, CordaConfig)
    instance_of(
        "data", data, Iterable, CalibrationError, remedy="give batches of token ids or covariances"
    )


def _stages(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    domain: str,
    clock: Stopwatch,
) -> Iterator[CovarianceSet]:
    """The covariances that the adapter is made of, at once or in pieces."""
    if isinstance(data, CovarianceSet):
        _check_complete(modules, data)
        yield data
        return
    yield from covariance_stages(
        model,
        data,
        targets=config.targets if _complete(model, modules, config) else list(modules),
        rank=config.rank if config.stability else None,
        ends=(config.which,),
        damping=config.damping,
        candidates=config.candidates,
        selection=config.selection,
        condition=config.condition,
        domain=domain,
        memory_limit=config.memory_limit,
        all_at_once=config.budget is not None,
        distributed=config.distributed,
        progress=config.progress,
        clock=clock,
    )


def check_targets(
    model: nn.Module, config: CordaConfig, *, use_peft: bool = True
) -> dict[str, nn.Module]:
    """The layers that `config` selects, after a check of its rank or budget.

    Of "all-linear" those are left out that PEFT adapts in no LoRA of this model.

    Raises:
        TargetError: no layer matches, one shares its weight with another module, one is quantised
            and residual is "weight", one that is named cannot be adapted by PEFT, or
            modules_to_save names what is not there or adapted.
        ConfigError: the budget cannot be read.
        RankError: the rank is not possible for a layer, or the budget does not pay for the least.
        ModelError: the model carries an adapter already, is the residual of one, or is wrapped.
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
    check_unwrapped(model)
    modules = target_linears(model, config.targets, config.exclude_modules)
    reasons = not_selectable(model, modules) if use_peft else {}
    if reasons and (config.targets != "all-linear" or len(reasons) == len(modules)):
        name = next(iter(reasons))
        raise TargetError(
            f"layer {name} cannot be adapted through PEFT ({reasons[name]}): leave it out by "
            "exclude_modules, or take init_corda(…, use_peft=False)"
        )
    modules = {name: module for name, module in modules.items() if name not in reasons}
    check_unshared(model, modules)
    _check_saved(model, modules, config.modules_to_save or ())
    if config.residual == "weight":
        check_writable(
            modules,
            'residual="weight" writes W − B A into it',
            "take residual=None, which leaves it as it is, or load the model in a floating dtype",
        )
    if config.budget is not None:
        check_guaranteed(
            layer_shapes(modules),
            adapter_parameters(model, modules, config),
            config.min_rank,
            config.max_rank,
            config.rank_multiple,
            config.rows,
        )
        return modules
    for name, (outputs, inputs) in layer_shapes(modules).items():
        if not 1 <= config.rank <= min(outputs, inputs):
            raise RankError(
                f"rank {config.rank} is not possible for layer {name} ({outputs} × {inputs}): "
                f"choose one between 1 and {min(outputs, inputs)}, or leave the layer out"
            )
    return modules


def _complete(model: nn.Module, modules: Mapping[str, nn.Module], config: CordaConfig) -> bool:
    """Whether the modules are all that `config.targets` selects."""
    return target_linears(model, config.targets).keys() == modules.keys()


def _warn_left_out(model: nn.Module, config: CordaConfig, modules: Mapping[str, nn.Module]) -> None:
    """Says which layers of "all-linear" `check_targets` has left out, as PEFT adapts none of them.

    What no calibration reaches is told with them, since the calibration is then given names.
    """
    names = target_linears(model, config.targets, config.exclude_modules).keys() - modules.keys()
    if names:
        reasons = not_selectable(model, sorted(names)) | unreached_weights(model)
        warnings.warn(
            f"{len(reasons)} layers or weights get no adapter, for one {min(names)}: "
            f"{reasons[min(names)]}; init_corda(…, use_peft=False) adapts {len(names)} of them",
            LeftOutWarning,
            stacklevel=4,
        )


def _check_saved(model: nn.Module, modules: Mapping[str, nn.Module], saved: Sequence[str]) -> None:
    """Makes sure that modules to be trained whole are there, and hold no layer to be adapted."""
    for ending in saved:
        whole = [
            name
            for name, _ in model.named_modules()
            if name == ending or name.endswith(f".{ending}")
        ]
        if not whole:
            raise TargetError(f"modules_to_save names {ending!r}, which the model does not have")
        for name in modules:
            if any(name == part or name.startswith(f"{part}.") for part in whole):
                raise TargetError(
                    f"modules_to_save names {ending!r}, and layer {name} in it is to be adapted: "
                    "leave it out by exclude_modules, or do not name it"
                )


def _covered(modules: Mapping[str, nn.Module], covariances: CovarianceSet) -> dict[str, nn.Module]:
    """The modules that have a covariance in the set, after a check that it is of their size."""
    covered = {name: module for name, module in modules.items() if name in covariances}
    for name, module in covered.items():
        inputs = linear_shape(module)[1]
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


def _rank_deficient(names: Iterable[str], covariances: CovarianceSet) -> dict[str, tuple[int, int]]:
    """Tokens and channels of each layer whose covariance is singular, having fewer tokens."""
    return {
        name: (covariances[name].tokens, covariances[name].matrix.shape[0])
        for name in names
        if covariances[name].tokens < covariances[name].matrix.shape[0]
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
        f"the covariances of {len(short)} layer(s) come from fewer tokens than channels and are "
        f"singular, for one {name} ({tokens} tokens, {channels} channels): {effect}; use more "
        "samples or longer sequences",
        RankDeficientWarning,
        stacklevel=4,
    )
