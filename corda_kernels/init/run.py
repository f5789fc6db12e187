"""The one call: an adapter for a model from calibration text or covariances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from corda_kernels.adapter import (
    Adapter,
    AdapterRecord,
    attach,
    check_at_hand,
    describe_base,
)
from corda_kernels.arguments import flag, instance_of
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.batches import Batch
from corda_kernels.calibration.distributed import Ranks, covariances_given, layers_given
from corda_kernels.errors import CalibrationError, ConfigError
from corda_kernels.init.checks import (
    check_complete,
    check_targets,
    covered_modules,
    rank_deficient,
    warn_left_out,
    warn_rank_deficient,
)
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.covariances import CalibrationPlan, covariance_stages, united_provenance
from corda_kernels.init.layers import MadeLayer, layer_adapters
from corda_kernels.init.measured import measured_input, measured_layers, measured_run
from corda_kernels.init.ranks import layer_shapes, planned_ranks
from corda_kernels.linears import unpack
from corda_kernels.models import devices, target_linears
from corda_kernels.planning import Stability
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
    domain: str = CalibrationPlan.domain,
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
    warn_left_out(model, config, modules)
    unpack(modules)
    ranks = Ranks.of(config.distributed)
    ranks.agree("corda_adapter", lambda: _given(model, modules, data, config, domain))
    clock = Stopwatch(devices(model))
    work = _Work(model, modules, config, ranks, clock)
    if isinstance(data, CovarianceSet):
        check_complete(modules, data)
        work.add(data)
    else:
        # Names are given only where "all-linear" would take more than can be adapted.
        whole = target_linears(model, config.targets).keys() == modules.keys()
        plan = config.calibration(config.targets if whole else list(modules), domain)
        for covariances in covariance_stages(model, data, plan, clock=clock):
            work.add(covariances)
            del covariances  # before the next ones are made
    return work.adapter()


@dataclass
class _Work:
    """What the stages of covariances have given so far."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    config: CordaConfig
    ranks: Ranks
    clock: Stopwatch
    made: dict[str, MadeLayer] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    provenances: list[dict[str, Any]] = field(default_factory=list)
    short: dict[str, tuple[int, int]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, covariances: CovarianceSet) -> None:
        """Decomposes the layers that have a covariance here."""
        covered = covered_modules(self.modules, covariances)
        self.short |= rank_deficient(covered, covariances)
        planned = planned_ranks(self.model, covered, covariances, self.config, self.clock)
        self.allocation = planned.allocation
        with self.clock.stage("decomposition"):
            made = self._decomposed(covered, covariances, planned.ranks)
        self.made |= made
        parts = {name: layer.spectrum for name, layer in made.items()}
        self.measured |= measured_layers(
            layer_shapes(covered), parts, planned.spectra, self.config.condition
        )
        self.inputs += [measured_input(part, names) for part, names in covariances.groups()]
        self.provenances.append(covariances.provenance)

    def _decomposed(
        self,
        modules: Mapping[str, nn.Module],
        covariances: CovarianceSet,
        components: Mapping[str, int],
    ) -> dict[str, MadeLayer]:
        """The adapters of all layers that get a component, each made by one of the ranks."""
        adapted = {name: module for name, module in modules.items() if components[name]}
        share = self.ranks.share_layers(adapted)
        shown = self.config.progress and self.ranks.rank == 0
        made = layer_adapters(share, covariances, components, self.config, progress=shown)
        if self.ranks.size > 1:
            made = {name: layer.to(torch.device("cpu")) for name, layer in made.items()}
        united: dict[str, MadeLayer] = {}
        for part in self.ranks.gather(made, "decompositions"):
            united |= part
        return united

    def adapter(self) -> Adapter:
        """The adapter of all layers, and its record."""
        config = self.config
        warn_rank_deficient(self.short, config.damping)
        made = {name: self.made[name] for name in self.modules if name in self.made}
        calibration = united_provenance(self.provenances)
        stability = calibration.pop("stability", None)
        if stability:
            # A covariance file may know of other layers, and of the end that is not trained.
            judged = Stability.from_json(stability).at(config.which, made)
            stability = None if judged is None else judged.to_json()
        record = AdapterRecord(
            mode=config.mode,
            rank=max(layer.note["rank"] for layer in made.values()),
            hold=None if config.residual else config.hold,
            residual=config.residual,
            damping=config.damping,
            base=describe_base(self.model, {name: self.modules[name] for name in made}),
            stability=stability or {},
            calibration=calibration,
            layers={name: layer.note for name, layer in made.items()},
            allocation=self.allocation,
            measured=measured_run(self.measured, self.inputs, self.clock),
            versions=library_versions(),
            lora=config.lora,
        )
        return Adapter({name: layer.adapter for name, layer in made.items()}, record)


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
