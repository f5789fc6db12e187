"""The one call: an adapter for a model from calibration text or covariances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from corda_kernels.adapter import Adapter, AdapterRecord, attach
from corda_kernels.adapter.attaching import check_at_hand
from corda_kernels.adapter.base import describe_base, exact_targets
from corda_kernels.arguments import flag, instance_of
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.distributed import Ranks, covariances_given, layers_given
from corda_kernels.calibration.expert_layers import expert_covariances
from corda_kernels.errors import CalibrationError, ConfigError, LeftOutWarning, RankError, warn
from corda_kernels.init.checks import (
    AdaptedLayers,
    check_given,
    check_memory,
    check_targets,
    warn_rank_deficient,
)
from corda_kernels.init.config import CalibrationPlan, CordaConfig
from corda_kernels.init.covariances import DOMAIN, covariance_stages, united_provenance
from corda_kernels.init.experts import for_each, united_experts, united_inputs, united_spectra
from corda_kernels.init.layers import MadeLayer, made_layers
from corda_kernels.init.measured import measured_layer
from corda_kernels.linears import unpack
from corda_kernels.memory import cuda_peak_bytes, peak_bytes
from corda_kernels.planning import Stability, allocate_ranks, layer_spectra
from corda_kernels.planning.ranks import Shape, component_size, components
from corda_kernels.planning.scores import SCORING_DAMPING, LayerSpectrum
from corda_kernels.structure import devices
from corda_kernels.targets import unreached_weights
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
        model: a transformers model. Its weights stay as they are, except with
            `residual="weight"`.
        data: calibration batches, see `calibrate`; or covariances.
        config: how to make the adapter.
        use_peft: False for CordaLinear layers in place of a PeftModel; a classification head is
            then frozen like the rest.
        keep: sample of the knowledge to keep, as batches or covariances, for mode "task"; None for
            none.


    Returns:
        A stock PeftModel with one LoRA of twice the rank (in mode "task" of the same rank), all of
        it trainable unless `freeze_a`; or, without PEFT, `model` with its layers replaced by
        CordaLinear.


    Raises:
        TargetError: no layer matches.
        RankError: a named layer, or every layer, is too small for the rank (found before anything
            runs); or a budget does not pay for a single component.
        ConfigError: the budget cannot be read, or the covariances that it needs exceed the memory
            limit; or there are fewer batches than candidates; or an option needs PEFT.
        CovarianceError: given covariances do not cover the layers, or do not have their sizes.
        CalibrationError: the forward passes gave no usable covariance for a layer.
        AdapterError: weights are offloaded, found before anything runs.
        DistributedError: another rank has ended, or was given something else.

    Source: CorDA (arXiv:2406.05223), algorithm 1.
    """
    _check_kinds(data, config, keep)
    flag("use_peft", use_peft)
    if config.lora and not use_peft:
        raise ConfigError(f"{min(config.lora)} is an option of PEFT: it needs use_peft=True")
    layers = check_targets(model, config, use_peft=use_peft)
    check_at_hand(layers.modules)
    Ranks.of(config.distributed).agree("init_corda", lambda: {"use_peft": use_peft})
    adapter = _adapter(model, layers, data, config, keep, DOMAIN)
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
    """Makes the adapter of `init_corda` without attaching it, which changes no weight.

    Args:
        model: see `init_corda`.
        data: see `init_corda`.
        config: see `init_corda`.
        domain: name of the text that the batches are a sample of.
        use_peft: whether PEFT will attach the adapter; PEFT cannot adapt every layer.

        keep: see `init_corda`.

    Raises:
        CordaError: see `init_corda`.
    """
    _check_kinds(data, config, keep)
    layers = check_targets(model, config, use_peft=use_peft)
    return _adapter(model, layers, data, config, keep, domain)


def _adapter(
    model: nn.Module,
    layers: AdaptedLayers,
    data: Iterable[Batch] | CovarianceSet,
    config: CordaConfig,
    keep: Iterable[Batch] | CovarianceSet | None,
    domain: str,
) -> Adapter:
    """The adapter of layers that have been checked."""
    if layers.left_out:
        # What no calibration reaches is told with them, since the calibration is given names.
        count = len(layers.left_out | unreached_weights(model, config.targets))
        name = min(layers.left_out)
        says = f"{count} layers or weights get no adapter, for one {name}: {layers.left_out[name]}"
        warn(says, LeftOutWarning)
    unpack(layers.modules)
    samples = {"data": data} if keep is None else {"data": data, "keep": keep}
    given = {name: each for name, each in samples.items() if isinstance(each, CovarianceSet)}
    Ranks.of(config.distributed).agree(
        "corda_adapter",
        lambda: {
            **layers_given({"": model}, layers.modules),
            **config.given(),
            "domain": domain,
            # Batches are compared where they are run.
            **{name: "covariances" if name in given else "batches" for name in samples},
            **{
                f"{what} to keep" if name == "keep" else what: value
                for name, each in given.items()
                for what, value in covariances_given(each).items()
            },
        },
    )
    check_given(layers, config, given)
    limit = check_memory(model, layers, config, samples.keys() - given.keys())
    clock = Stopwatch(devices(model))
    kept = given.get("keep")
    if keep is not None and not isinstance(keep, CovarianceSet):
        plan = CalibrationPlan(
            targets=exact_targets(layers.names),
            experts=config.experts,
            distributed=config.distributed,
            progress=config.progress,
        )
        (kept,) = covariance_stages(model, keep, plan, domain="the knowledge to keep", clock=clock)
    stages: Iterable[CovarianceSet]
    if isinstance(data, CovarianceSet):
        stages = (data,)
    else:
        exact = replace(config, memory_limit=limit)
        if layers.left_out or config.exclude_modules:  # `targets` would select these as well
            exact = replace(exact, targets=exact_targets(layers.names))
        stages = covariance_stages(model, data, exact, domain=domain, clock=clock)
    making = _Making(layers, config, kept, clock)
    for covariances in stages:
        making.add(covariances)
        del covariances  # before the next ones are made
    return making.adapter(model)


@dataclass
class _Making:
    """An adapter in the making, of covariances of all layers or of one block after the other.

    Attributes:
        layers: that are adapted.
        config: how.
        kept: in mode "task" the covariances of what is to be kept, if anything.
        clock: takes the time of the stages.
        made: the layers' adapters so far.
        notes: what `measured_layer` gave of each layer.
        inputs: what `measured_input` gave of each input.
        provenances: of the covariances.
        allocation: of a budget, as JSON.
    """

    layers: AdaptedLayers
    config: CordaConfig
    kept: CovarianceSet | None
    clock: Stopwatch
    made: dict[str, MadeLayer] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    provenances: list[dict[str, Any]] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)

    def add(self, covariances: CovarianceSet) -> None:
        """Makes the adapters of those layers that these covariances are of."""
        config, experts, kept = self.config, self.layers.experts, self.kept
        if kept is None:
            inputs = united_inputs(covariances, experts)
            # Gradients come from the last block to the first.
            backwards = config.sides == "both"
            self.inputs = [*inputs, *self.inputs] if backwards else [*self.inputs, *inputs]
        elif not self.inputs:
            self.inputs = united_inputs(kept, experts)
        self.provenances.append(covariances.provenance)
        covariances = expert_covariances(covariances, experts)
        if kept is not None:
            kept = expert_covariances(kept, experts)
        covered = {
            name: module
            for name, module in self.layers.each.items()
            if name in covariances and (kept is None or name in kept)
        }
        shapes = {
            name: shape
            for name, shape in self.layers.shapes.items()
            if not covered.keys().isdisjoint(for_each(experts, {name: 0}))
        }
        spectra: dict[str, LayerSpectrum] = {}
        if config.budget is None:
            ranks = {n: components(config.rank, s, self.layers.active) for n, s in shapes.items()}
        else:
            with self.clock.stage("allocation"):
                spectra = layer_spectra(
                    covered,
                    covariances,
                    damping=config.damping or SCORING_DAMPING,
                    condition=config.condition,
                    distributed=config.distributed,
                    progress=config.progress,
                )
                whole = united_spectra(experts, spectra)
                self.allocation = _shared_out(whole, shapes, self.layers.parameters, config)
            ranks = self.allocation["ranks"]
        with self.clock.stage("decomposition"):
            made = made_layers(covered, covariances, for_each(experts, ranks), config, kept)
        for name, module in covered.items():
            part = made[name].spectrum if name in made else {}
            self.notes[name] = measured_layer(module, part, spectra.get(name), config.condition)
        self.made |= made

    def adapter(self, model: nn.Module) -> Adapter:
        """All layers together, with the record of how they were made."""
        config, layers = self.config, self.layers
        if config.mode != "task" or self.kept is not None:
            warn_rank_deficient(layers.names, self.inputs, config.damping)
        united, notes = united_experts(layers.experts, self.made, self.notes)
        made = {name: united[name] for name in layers.names if name in united}
        notes = {name: notes[name] for name in layers.names if name in notes}
        calibration = united_provenance(self.provenances)
        stability = calibration.pop("stability", None)
        if self.kept is not None:
            known = self.kept.provenance
            told = ("model", "data", "mixture", "tokens")
            calibration["keep"] = {note: known[note] for note in told if note in known}
        peaks = {"process": peak_bytes()} | cuda_peak_bytes()
        record = AdapterRecord(
            mode=config.mode,
            rank=max(layer.note.rank for layer in made.values()),
            hold=None if config.residual else config.hold,
            residual=config.residual,
            damping=config.damping,
            base=describe_base(
                model,
                {name: module for name, module in layers.modules.items() if name in made},
                {name: parameter for name, parameter in layers.experts.items() if name in made},
            ),
            stability=_judged(stability, config, made),
            calibration=calibration,
            layers={name: layer.note for name, layer in made.items()},
            allocation=self.allocation,
            measured={
                "layers": notes,
                "inputs": self.inputs,
                "seconds": {stage: round(time, 3) for stage, time in self.clock.seconds.items()},
                "peak_bytes": {place: peak for place, peak in peaks.items() if peak},
            },
            versions=library_versions(),
            lora=config.lora | ({"modules_to_save": layers.saved} if layers.saved else {}),
            freeze_a=config.freeze_a,
            sides=config.sides,
        )
        return Adapter({name: layer.adapter for name, layer in made.items()}, record)


def _judged(
    stability: dict[str, Any] | None, config: CordaConfig, names: Iterable[str]
) -> dict[str, Any]:
    """What covariances say of their stability, for the layers and the end that are trained.

    It is that of W·C, and says nothing of an adapter that is made of another product.
    """
    if not stability or config.sides == "both":
        return {}
    judged = Stability.from_json(stability).at(config.which, names)
    return asdict(judged) if judged else {}


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
    shared = partial(
        allocate_ranks,
        {name: spectrum.singular_values for name, spectrum in spectra.items()},
        {name: spectrum.log_condition for name, spectrum in spectra.items()},
        shapes,
        mode=cast(Any, config.mode),  # a budget is refused in mode "task"
        min_rank=config.min_rank,
        max_rank=config.max_rank,
        rank_multiple=config.rank_multiple,
        rows=config.rows,
    )
    prices = {name: config.rows * component_size(shape) for name, shape in shapes.items()}
    ranks = shared(budget=budget)
    spent = sum(rank * prices[name] for name, rank in ranks.items())
    if not spent:
        # The least budget that pays for anything pays for the layer that is first in line alone.
        multiples = sorted({config.rank_multiple * price for price in prices.values()})
        first = next(found for each in multiples if any((found := shared(budget=each)).values()))
        name = max(first, key=first.__getitem__)
        raise RankError(
            f"a budget of {budget} adapter parameters is too small: layer {name} comes first and "
            f"takes {first[name] * prices[name]} for {first[name]} component(s): raise the budget, "
            "or write it as the rank it would hold in all layers (r=8)"
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
                f'mode "{config.mode}" does not use keep, only data: leave keep out, or take mode '
                '"task"'
            )
