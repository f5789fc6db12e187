"""Refusals before the work: which layers an adapter gets, and whether it can have them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from corda_kernels.adapter.base import exact_targets
from corda_kernels.adapter.experts import not_selectable, rewritten_layers
from corda_kernels.adapter.model import has_adapter, residual_marker
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.distributed import check_sharded
from corda_kernels.calibration.expert_layers import expert_covariances, expert_layers
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import (
    ConfigError,
    CovarianceError,
    ModelError,
    RankDeficientWarning,
    RankError,
    TargetError,
    warn,
)
from corda_kernels.experts import ExpertParameter
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.experts import active_experts, check_experts, layer_shapes
from corda_kernels.linears import check_writable, is_linear, is_quantised, linear_shape
from corda_kernels.planning.ranks import (
    Shape,
    check_guaranteed,
    components,
    parse_budget,
    uniform_budget,
)
from corda_kernels.structure import check_unwrapped, classification_heads, devices
from corda_kernels.targets import check_unshared, target_layers


@dataclass(frozen=True, eq=False)
class AdaptedLayers:
    """What of a model gets an adapter.

    Attributes:
        modules: linear layers, by name.
        experts: parameters of fused experts, by name.
        left_out: layers that could have one but for the reason given, by name.
        saved: names of modules that are trained whole beside it.
        active: how many routed experts a token is sent to.
        parameters: the most parameters that the adapter may have.
    """

    modules: dict[str, nn.Module]
    experts: dict[str, ExpertParameter]
    left_out: dict[str, str]
    saved: list[str]
    active: int
    parameters: int

    @property
    def names(self) -> list[str]:
        """Of linear layers and parameters, which come last."""
        return [*self.modules, *self.experts]

    @property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of linear layers and (experts, out, in) of parameters."""
        return layer_shapes(self.modules, self.experts)

    @cached_property
    def each(self) -> dict[str, nn.Module]:
        """The linear layers, and each expert as one."""
        return {**self.modules, **expert_layers(self.experts)}


def check_targets(model: nn.Module, config: CordaConfig, *, use_peft: bool = True) -> AdaptedLayers:
    """The layers that `config` selects, after a check of its rank or budget.

    Layers that are too small, or that PEFT cannot adapt, are left out, unless `targets` names them:
    then it is an error.

    Raises:
        TargetError: no layer matches, one shares its weight with another module, one is quantised
            and residual is "weight", one that is named cannot be adapted by PEFT, or
            modules_to_save names what is not there or adapted.
        ConfigError: the budget cannot be read.
        RankError: the rank is not possible for a layer that is named, or for none; or the budget
            does not pay for the least.
        ModelError: the model carries an adapter already, is the residual of one, is wrapped, or is
            on a device that has no float64.
    """
    if has_adapter(model):
        raise ModelError(
            "the model carries an adapter already: load the base again, or merge the adapter first"
        )
    if residual_marker(model) is not None:
        raise ModelError(
            "this model is the residual of an adapter, as init --save-base writes it: load the "
            "untouched base"
        )
    check_unwrapped(model)
    for device in devices(model):
        if device.type not in ("cpu", "cuda", "meta"):  # meta: offloaded weights
            raise ModelError(f"layers on {device} cannot be decomposed: move the model to the CPU")
    asked = config.experts is not None
    modules, experts = target_layers(model, config.targets, config.exclude_modules, experts=asked)
    left_out = _not_adaptable(model, modules, config) if use_peft else {}
    named = config.targets not in (None, "all-linear")
    if left_out and (named or len(left_out) == len(modules)):
        name = next(iter(left_out))
        raise TargetError(
            f"layer {name} cannot be adapted through PEFT ({left_out[name]}): leave it out by "
            "exclude_modules, or take init_corda(…, use_peft=False)"
        )
    remedy = "; init_corda(…, use_peft=False) adapts it"
    left_out = {name: reason + remedy for name, reason in left_out.items()}
    modules = {name: module for name, module in modules.items() if name not in left_out}
    active = active_experts(model)
    shapes = layer_shapes(modules, experts)
    small = _too_small(shapes, config, active)
    if small and (named or not small.keys().isdisjoint(experts) or len(small) == len(shapes)):
        name = min(small, key=small.__getitem__)
        outputs, inputs = shapes[name][-2:]
        raise RankError(
            f"rank {config.rank} is not possible for layer {name} ({outputs} × {inputs}): choose "
            f"one between 1 and {small[name]}, or leave the layer out"
        )
    for name in small:
        outputs, inputs = linear_shape(modules.pop(name))
        left_out[name] = f"it is {outputs} × {inputs}, too small for rank {config.rank}"
    check_unshared(model, modules)
    check_experts(experts, config, use_peft=use_peft)
    sharded = {
        'residual="weight"': bool(config.residual),
        'sides="both"': config.sides == "both",
        "an adapter of fused experts": bool(experts),
        "use_peft=False": not use_peft,
    }
    check_sharded(model, config.distributed, sharded)
    saved = [*(config.modules_to_save or ()), *classification_heads(model)] if use_peft else []
    _check_saved(model, [*modules, *experts], saved)
    if config.residual == "weight":
        check_writable(
            modules,
            'residual="weight" writes W − B A into it',
            "take residual=None, which leaves it as it is, or load the model in a floating dtype",
        )
    shapes = layer_shapes(modules, experts)
    if config.budget is None:
        parameters = uniform_budget(shapes, config.rank, config.rows, active)
    else:
        parameters = parse_budget(config.budget, shapes, _weights(model), config.rows, active)
        check_guaranteed(shapes, parameters, *config.bounds, config.rows)
    return AdaptedLayers(modules, experts, left_out, list(dict.fromkeys(saved)), active, parameters)


def _too_small(shapes: Mapping[str, Shape], config: CordaConfig, active: int) -> dict[str, int]:
    """The layers without as many components as each is to have, with the largest rank for each."""
    if config.budget is not None:
        return {}
    most = {name: min(shape[-2:]) for name, shape in shapes.items()}
    return {
        # Of experts those of a token together: rank // active is what each gets.
        name: most[name] if len(shape) == 2 else active * (most[name] + 1) - 1
        for name, shape in shapes.items()
        if components(config.rank, shape, active) > most[name]
    }


def _weights(model: nn.Module) -> int:
    """How many numbers a model's parameters hold."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if is_linear(module) and is_quantised(module):  # of four bits two weights are one number
            whole += math.prod(linear_shape(module)) - module.weight.numel()  # type: ignore[operator]
    return whole


def _not_adaptable(
    model: nn.Module, modules: Mapping[str, nn.Module], config: CordaConfig
) -> dict[str, str]:
    """The layers that PEFT adapts neither by their names nor by those of their weights."""
    reasons = not_selectable(model, modules)
    if not config.lora_dropout and not config.use_dora:
        for name in rewritten_layers(model, modules):
            if isinstance(modules[name], nn.Linear) and not is_quantised(modules[name]):
                del reasons[name]
    return reasons


def _check_saved(model: nn.Module, modules: Collection[str], saved: Sequence[str]) -> None:
    """Makes sure that modules to be trained whole are there, and hold no layer to be adapted."""
    names = [name for name, _ in model.named_modules()]
    for ending in saved:
        whole = [name for name in names if f".{name}".endswith(f".{ending}")]
        if not whole:
            raise TargetError(f"modules_to_save names {ending!r}, which the model does not have")
        for name in modules:
            if any(f"{name}.".startswith(f"{part}.") for part in whole):
                raise TargetError(
                    f"modules_to_save names {ending!r}, and layer {name} in it is to be adapted: "
                    "leave it out by exclude_modules, or do not name it (classification heads are "
                    "saved unasked)"
                )


def check_given(
    layers: AdaptedLayers, config: CordaConfig, given: Mapping[str, CovarianceSet]
) -> None:
    """Makes sure that given covariances are of the layers, with what the configuration builds on.

    Args:
        layers: that are adapted.
        config: how.
        given: by the name of the argument, "data" or "keep".

    Raises:
        CovarianceError: they are not.
    """
    found = {what: expert_covariances(each, layers.experts) for what, each in given.items()}
    for what, covariances in found.items():
        _check_covered(what, layers.each, covariances)
    if config.sides == "both" and "data" in given:
        _check_gradients(layers.each, given["data"], config)
    if len(found) == 2 and not any(all(name in g for g in found.values()) for name in layers.each):
        raise CovarianceError(
            "data and keep have no layer in common: calibrate both with the same targets"
        )


def check_memory(
    model: nn.Module, layers: AdaptedLayers, config: CordaConfig, texts: Collection[str]
) -> int | None:
    """What a memory limit leaves for the text that an adapter is made of, beside all covariances of
    a text to keep.

    Args:
        model: the model.
        layers: that are adapted.
        config: with the limit.
        texts: which of "data" and "keep" is a text.

    Raises:
        ConfigError: they do not fit, even where the other text goes block by block.
    """
    limit, names = config.memory_limit, exact_targets(layers.names)
    if limit is None or "keep" not in texts:
        return limit
    needed = kept = covariance_bytes(model, names, config.experts)[0]
    if "data" in texts:
        whole, block = covariance_bytes(model, names, config.experts, config.sides)
        needed += block or whole
    if needed > limit:
        raise ConfigError(
            "the covariances of the text to keep do not fit beside those of data: raise the memory "
            f"limit to {needed} bytes, choose fewer targets, or calibrate that text by itself and "
            "give its covariances"
        )
    return limit - kept


def _check_covered(what: str, modules: Mapping[str, nn.Module], covariances: CovarianceSet) -> None:
    """Makes sure that a set has a covariance of every module that was not left out on purpose."""
    for name, module in modules.items():
        if name in covariances:
            inputs, channels = linear_shape(module)[1], covariances[name].matrix.shape[0]
            if channels != inputs:
                raise CovarianceError(
                    f"layer {name} has {inputs} inputs, but its covariance in {what} {channels} "
                    "channels: the covariances were taken from another model"
                )
        elif name not in covariances.left_out:
            raise CovarianceError(
                f"there is no covariance for layer {name} in {what}: calibrate the same model with "
                "the same targets, or leave the layer out of the targets"
            )
    if modules.keys().isdisjoint(covariances):
        raise CovarianceError(f"the covariances in {what} cover none of the target layers")


def _check_gradients(
    modules: Mapping[str, nn.Module], covariances: CovarianceSet, config: CordaConfig
) -> None:
    """Makes sure that there are gradients of these layers, and of the labels that are asked for."""
    for name, module in modules.items():
        found = covariances.gradients.get(name)
        if name in covariances and found is None:
            raise CovarianceError(
                f"there is no gradient for layer {name}, which {config.mode!r} with "
                f'sides="both" needs: calibrate(…, sides="both", labels="{config.labels}")'
            )
        if found is not None and found.mean.shape != linear_shape(module):
            raise CovarianceError(
                f"layer {name} is {linear_shape(module)}, but its gradient "
                f"{tuple(found.mean.shape)}: the gradients were taken from another model"
            )
    labels = covariances.provenance.get("labels", config.labels)
    if labels != config.labels:
        raise CovarianceError(
            f'the gradients are of {labels} labels, but labels="{config.labels}" was asked for: '
            f'calibrate(…, sides="both", labels="{config.labels}"), or in another mode than "task" '
            f'CordaConfig(…, labels="{labels}")'
        )


def warn_rank_deficient(
    names: Collection[str], inputs: Sequence[Mapping[str, Any]], damping: float | None
) -> None:
    """Says which covariances are singular for want of tokens, and what stood in for the rest.

    Args:
        names: of the layers that it is about.
        inputs: what `measured_input` gave of each covariance.
        damping: of all of them.
    """
    notes = [(note, name) for note in inputs for name in note["layers"] if name in names]
    short = [each for each in notes if each[0]["tokens"] < each[0]["channels"]]
    if not short:
        return
    note, name = max(short, key=lambda each: each[0]["channels"])
    effect = "without damping, directions that the text never touched are ordered by the weights"
    if damping:
        effect = (
            f"a damping of {damping:g} times the mean diagonal was added, which stands in for the "
            "directions that the text never touched"
        )
    warn(
        f"the covariances of {len(short)} layer(s) come from fewer tokens than channels and are "
        f"singular, among them {name} ({note['tokens']} tokens, {note['channels']} channels): "
        f"{effect}. The adapter is valid; more samples or longer sequences improve it",
        RankDeficientWarning,
    )
