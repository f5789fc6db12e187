"""The one call: an adapter for a model from calibration text or covariances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from corda_kernels.adapter import Adapter, AdapterRecord, attach, check_at_hand, describe_base
from corda_kernels.arguments import flag, instance_of
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.distributed import Ranks, covariances_given, layers_given
from corda_kernels.calibration.expert_layers import expert_covariances, expert_layers
from corda_kernels.errors import CalibrationError, ConfigError, RankError
from corda_kernels.init.checks import (
    adapter_parameters,
    check_covered,
    check_gradients,
    check_targets,
    modules_to_save,
    selected_experts,
    warn_left_out,
    warn_rank_deficient,
)
from corda_kernels.init.config import CalibrationPlan, CordaConfig
from corda_kernels.init.covariances import DOMAIN, covariance_stages, united_provenance
from corda_kernels.init.experts import (
    active_experts,
    for_each,
    layer_shapes,
    united_experts,
    united_inputs,
    united_spectra,
)
from corda_kernels.init.layers import MadeLayer, made_layers
from corda_kernels.init.measured import measured_layer
from corda_kernels.linears import unpack
from corda_kernels.memory import cuda_peak_bytes, peak_bytes
from corda_kernels.planning import Stability, allocate_ranks, layer_spectra
from corda_kernels.planning.ranks import Shape, component_size, components
from corda_kernels.planning.scores import SCORING_DAMPING, LayerSpectrum
from corda_kernels.structure import devices
from corda_kernels.targets import target_layers
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
    keep: Iterable[Batch] | CovarianceSet | None = None,
) -> PeftModel | nn.Module:
    """Initialises a CorDA adapter and attaches it, ready to train.

    At the start the adapted model computes what the base does.

    Args:
        model: a transformers model. Its weights stay as they are, but for `residual="weight"`.
        data: calibration batches, see `calibrate`; or covariances.
        config: how.
        use_peft: False for CordaLinear layers in place of a PeftModel; a classification head is
            then frozen as the rest.
        keep: in mode "task" a sample of the knowledge to keep, as batches or covariances; None for
            no regard to any.

    Returns:
        A stock PeftModel with one LoRA of twice the rank (in mode "task" of the rank), all of it to
        be trained but for `freeze_a`; or, without PEFT, `model` with its layers replaced by
        CordaLinear.

    Raises:
        TargetError: no layer matches.
        RankError: a layer that is named is too small for the rank, or all are, found before
            anything runs; or a budget does not pay for a single component.
        ConfigError: the budget cannot be read, or all covariances that it needs do not fit into the
            memory limit; or there are fewer batches than candidates; or an option needs PEFT.
        CovarianceError: given covariances do not cover the layers, or have other sizes.
        CalibrationError: the forward passes gave no usable covariance for a layer.
        AdapterError: weights are offloaded, found before anything runs.
        DistributedError: another rank has ended, or was given something else.

    Source: CorDA (arXiv:2406.05223), algorithm 1.
    """
    _check_kinds(data, config, keep)
    flag("use_peft", use_peft)
    if config.lora and not use_peft:
        raise ConfigError(f"{min(config.lora)} is an option of PEFT: it needs use_peft=True")
    check_at_hand(check_targets(model, config, use_peft=use_peft))
    Ranks.of(config.distributed).agree("init_corda", lambda: {"use_peft": use_peft})
    adapter = corda_adapter(model, data, config, use_peft=use_peft, keep=keep)
    return attach(model, adapter, use_peft=use_peft, copy=False)


def corda_adapter(
    model: nn.Module,
    data: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    *,
    domain: str = DOMAIN,
    use_peft: bool = True,
    keep: Iterable[Batch] | CovarianceSet | None = None,
) -> Adapter:
    """Makes the adapter of `init_corda` without attaching it; the model is left as it was.

    Args:
        model: see `init_corda`.
        data: see `init_corda`.
        config: see `init_corda`.
        domain: what the batches are a sample of.
        use_peft: whether it is to be attached by PEFT, which cannot adapt every layer.
        keep: see `init_corda`.

    Raises:
        CordaError: see `init_corda`.
    """
    _check_kinds(data, config, keep)
    modules = check_targets(model, config, use_peft=use_peft)
    experts = selected_experts(model, config)
    warn_left_out(model, config, modules)
    unpack(modules)
    given = covariances_given(keep) if isinstance(keep, CovarianceSet) else {}
    Ranks.of(config.distributed).agree(
        "corda_adapter",
        lambda: {
            **layers_given({"": model}, modules),
            **config.given(),
            "domain": domain,
            # Batches are compared where they are run.
            "data": "covariances" if isinstance(data, CovarianceSet) else "batches",
            **(covariances_given(data) if isinstance(data, CovarianceSet) else {}),
            "keep": "none" if keep is None else type(keep) is CovarianceSet,
            **{f"{name} to keep": value for name, value in given.items()},
        },
    )
    clock = Stopwatch(devices(model))
    stages: Iterable[CovarianceSet]
    kept: CovarianceSet | None = None
    if isinstance(keep, CovarianceSet):
        check_covered(modules, keep)
    if isinstance(data, CovarianceSet):
        check_covered({**modules, **expert_layers(experts)}, expert_covariances(data, experts))
        check_gradients(modules, data, config)
        stages = (data,)
    else:
        # Names are given only where the targets would be more than can be adapted.
        whole = target_layers(model, config.targets)[0].keys() == modules.keys()
        plan = config if whole else replace(config, targets=[*modules, *experts])
        stages = covariance_stages(model, data, plan, domain=domain, clock=clock)
    layers, active = {**modules, **expert_layers(experts)}, active_experts(model)
    made: dict[str, MadeLayer] = {}
    allocation: dict[str, Any] = {}
    measured: dict[str, Any] = {"layers": {}, "inputs": []}
    provenances: list[dict[str, Any]] = []
    for covariances in stages:
        if keep is not None:
            kept = _kept(model, keep, config, list(modules), clock)
        measured["inputs"] += united_inputs(covariances if kept is None else kept, experts)
        provenances.append(covariances.provenance)
        covariances = expert_covariances(covariances, experts)
        covered = {name: module for name, module in layers.items() if name in covariances}
        if kept is not None:
            covered = {name: module for name, module in covered.items() if name in kept}
        shapes = {
            name: shape
            for name, shape in layer_shapes(modules, experts).items()
            if not covered.keys().isdisjoint(for_each(experts, {name: 0}))
        }
        ranks = {n: components(config.rank, shape, active) for n, shape in shapes.items()}
        spectra: dict[str, LayerSpectrum] = {}
        if config.budget is not None:
            with clock.stage("allocation"):
                spectra = layer_spectra(
                    covered,
                    covariances,
                    damping=config.damping or SCORING_DAMPING,
                    condition=config.condition,
                    distributed=config.distributed,
                    progress=config.progress,
                )
                budget = adapter_parameters(model, modules, config)
                allocation = _shared_out(united_spectra(experts, spectra), shapes, budget, config)
            ranks = allocation["ranks"]
        with clock.stage("decomposition"):
            made |= made_layers(covered, covariances, for_each(experts, ranks), config, kept)
        for name, module in covered.items():
            part = made[name].spectrum if name in made else {}
            note = measured_layer(module, part, spectra.get(name), config.condition)
            measured["layers"][name] = note
        del covariances  # before the next ones are made
    if config.mode != "task" or kept is not None:
        warn_rank_deficient({*modules, *experts}, measured["inputs"], config.damping)
    made, measured["layers"] = united_experts(experts, made, measured["layers"])
    made = {name: made[name] for name in (*modules, *experts) if name in made}
    calibration = united_provenance(provenances)
    if kept is not None:
        notes = ("model", "data", "mixture", "tokens")
        calibration["keep"] = {n: kept.provenance[n] for n in notes if n in kept.provenance}
    stability = calibration.pop("stability", None)
    if stability:
        # A covariance file may know of other layers, and of the end that is not trained.
        judged = Stability.from_json(stability).at(config.which, made)
        stability = judged and judged.to_json()
    saved = modules_to_save(model, config) if use_peft else []
    peaks = {"process": peak_bytes()} | cuda_peak_bytes()
    record = AdapterRecord(
        mode=config.mode,
        rank=max(layer.note["rank"] for layer in made.values()),
        hold=None if config.residual else config.hold,
        residual=config.residual,
        damping=config.damping,
        base=describe_base(
            model,
            {name: modules[name] for name in made if name in modules},
            {name: experts[name] for name in made if name in experts},
        ),
        stability=stability or {},
        calibration=calibration,
        layers={name: layer.note for name, layer in made.items()},
        allocation=allocation,
        measured={
            **measured,
            "seconds": {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()},
            "peak_bytes": {place: peak for place, peak in peaks.items() if peak},
        },
        versions=library_versions(),
        lora=config.lora | ({"modules_to_save": saved} if saved else {}),
        freeze_a=config.freeze_a,
    )
    return Adapter({name: layer.adapter for name, layer in made.items()}, record)


def _kept(
    model: nn.Module,
    keep: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    targets: list[str],
    clock: Stopwatch,
) -> CovarianceSet:
    """The covariances of what is to be kept, in one pass."""
    if isinstance(keep, CovarianceSet):
        return keep
    plan = CalibrationPlan(
        targets=targets, distributed=config.distributed, progress=config.progress
    )
    (kept,) = covariance_stages(model, keep, plan, domain="the knowledge to keep", clock=clock)
    return kept


def _shared_out(
    spectra: Mapping[str, LayerSpectrum],
    shapes: Mapping[str, Shape],
    budget: int,
    config: CordaConfig,
) -> dict[str, Any]:
    """The ranks that layers of these spectra get of a budget, as JSON.

    Raises:
        RankError: the budget does not pay for a single component.
    """
    ranks = allocate_ranks(
        {name: spectrum.singular_values for name, spectrum in spectra.items()},
        {name: spectrum.log_condition for name, spectrum in spectra.items()},
        shapes,
        budget=budget,
        mode="kpm" if config.which == "smallest" else "ipm",
        min_rank=config.min_rank,
        max_rank=config.max_rank,
        rank_multiple=config.rank_multiple,
        rows=config.rows,
    )
    spent = config.rows * sum(rank * component_size(shapes[name]) for name, rank in ranks.items())
    if not spent:
        raise RankError(
            f"a budget of {budget} adapter parameters does not pay for one component of the layer "
            "that is first in line: raise the budget, or write it as the rank it would hold in all "
            "layers (r=8)"
        )
    return {"budget": budget, "spent": spent, "condition": config.condition, "ranks": ranks}


def _check_kinds(data: object, config: CordaConfig, keep: object) -> None:
    instance_of("config", config, CordaConfig)
    remedy = "give batches of token ids or covariances"
    instance_of("data", data, Iterable, CalibrationError, remedy=remedy)
    if keep is not None:
        instance_of("keep", keep, Iterable, CalibrationError, remedy=remedy)
        if config.mode != "task":
            raise ConfigError(
                f'mode "{config.mode}" is made of one sample, `data`: leave keep out, or take mode '
                '"task"'
            )
