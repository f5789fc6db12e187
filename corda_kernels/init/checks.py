"""Refusals before the work: which layers an adapter gets, and whether it can have them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from corda_kernels.adapter import (
    has_adapter,
    not_selectable,
    residual_marker,
    rewritten_layers,
)
from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import (
    CovarianceError,
    LeftOutWarning,
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
from corda_kernels.structure import check_unwrapped, classification_heads
from corda_kernels.targets import check_unshared, target_layers, unreached_weights


def check_targets(
    model: nn.Module, config: CordaConfig, *, use_peft: bool = True
) -> dict[str, nn.Module]:
    """The layers that `config` selects, after a check of its rank or budget.

    Where `targets` does not name them, those are left out that are too small for the rank, or that
    PEFT adapts in no LoRA of this model.

    Raises:
        TargetError: no layer matches, one shares its weight with another module, one is quantised
            and residual is "weight", one that is named cannot be adapted by PEFT, or
            modules_to_save names what is not there or adapted.
        ConfigError: the budget cannot be read.
        RankError: the rank is not possible for a layer that is named, or for none; or the budget
            does not pay for the least.
        ModelError: the model carries an adapter already, is the residual of one, or is wrapped.
    """
    if has_adapter(model):
        raise ModelError("the model carries an adapter: load the base afresh, or merge the adapter")
    if residual_marker(model) is not None:
        raise ModelError(
            "this model is the residual that an adapter left (see --save-base): load the "
            "untouched base"
        )
    check_unwrapped(model)
    modules, experts = _selected(model, config)
    reasons = _not_adaptable(model, modules, config) if use_peft else {}
    named = config.targets not in (None, "all-linear")
    if reasons and (named or len(reasons) == len(modules)):
        name = next(iter(reasons))
        raise TargetError(
            f"layer {name} cannot be adapted through PEFT ({reasons[name]}): leave it out by "
            "exclude_modules, or take init_corda(…, use_peft=False)"
        )
    modules = {name: module for name, module in modules.items() if name not in reasons}
    shapes = layer_shapes(modules, experts)
    small = _too_small(model, shapes, config)
    if small and (named or not small.keys().isdisjoint(experts) or len(small) == len(shapes)):
        name, (outputs, inputs) = next(iter(small.items()))
        rank = components(config.rank, shapes[name], active_experts(model))
        raise RankError(
            f"rank {rank} is not possible for layer {name} ({outputs} × {inputs}): choose one "
            f"between 1 and {min(outputs, inputs)}, or leave the layer out"
        )
    modules = {name: module for name, module in modules.items() if name not in small}
    check_unshared(model, modules)
    check_experts(model, experts, config, use_peft=use_peft)
    _check_saved(model, [*modules, *experts], modules_to_save(model, config) if use_peft else ())
    if config.residual == "weight":
        check_writable(
            modules,
            'residual="weight" writes W − B A into it',
            "take residual=None, which leaves it as it is, or load the model in a floating dtype",
        )
    if config.budget is not None:
        shapes = {name: linear_shape(module, name) for name, module in modules.items()}
        most = adapter_parameters(model, modules, config)
        check_guaranteed(shapes, most, *config.bounds, config.rows)
    return modules


def _too_small(
    model: nn.Module, shapes: Mapping[str, Shape], config: CordaConfig
) -> dict[str, tuple[int, ...]]:
    """The layers without as many components as each is to have, with their (out, in)."""
    if config.budget is not None:
        return {}
    active = active_experts(model)
    return {
        name: shape[-2:]
        for name, shape in shapes.items()
        if components(config.rank, shape, active) > min(shape[-2:])
    }


def modules_to_save(model: nn.Module, config: CordaConfig) -> list[str]:
    """The modules that are trained whole: those that are asked for, and classification heads."""
    return list(dict.fromkeys([*(config.modules_to_save or ()), *classification_heads(model)]))


def selected_experts(model: nn.Module, config: CordaConfig) -> dict[str, ExpertParameter]:
    """The parameters of fused experts that are adapted, by name."""
    return _selected(model, config)[1]


def _selected(
    model: nn.Module, config: CordaConfig
) -> tuple[dict[str, nn.Module], dict[str, ExpertParameter]]:
    asked = config.experts is not None
    return target_layers(model, config.targets, config.exclude_modules, experts=asked)


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


def adapter_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], config: CordaConfig
) -> int:
    """How many parameters an adapter of `modules`, and of the experts that are selected, may have
    at most.

    Raises:
        ConfigError: the budget cannot be read.
    """
    shapes = layer_shapes(modules, selected_experts(model, config))
    active = active_experts(model)
    if config.budget is None:
        return uniform_budget(shapes, config.rank, config.rows, active)
    whole = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if is_linear(module) and is_quantised(module):  # of four bits two weights are one number
            whole += math.prod(linear_shape(module)) - module.weight.numel()  # type: ignore[operator]
    return parse_budget(config.budget, shapes, whole, config.rows, active)


def warn_left_out(model: nn.Module, config: CordaConfig, modules: Mapping[str, nn.Module]) -> None:
    """Says which layers that targets do not name `check_targets` has left out, and why: they are
    too small for the rank, or PEFT adapts none of them.

    What no calibration reaches is told with them, since the calibration is then given names.
    """
    every = _selected(model, config)[0]
    out = {name: module for name, module in every.items() if name not in modules}
    if out:
        small = {
            name: f"it is {outputs} × {inputs}, too small for rank {config.rank}"
            for name, (outputs, inputs) in _too_small(model, layer_shapes(out, {}), config).items()
        }
        reasons = _not_adaptable(model, out, config) | small
        unreached = unreached_weights(model, config.targets)
        name = min(reasons)
        says = f"{len(reasons | unreached)} layers or weights get no adapter, for one {name}: "
        remedy = f"; init_corda(…, use_peft=False) adapts {len(reasons) - len(small)} of them"
        warn(f"{says}{reasons[name]}{remedy if len(reasons) > len(small) else ''}", LeftOutWarning)


def check_covered(modules: Mapping[str, nn.Module], covariances: CovarianceSet) -> None:
    """Makes sure that a set has a covariance of every module that was not left out on purpose."""
    for name, module in modules.items():
        if name in covariances:
            inputs, channels = linear_shape(module)[1], covariances[name].matrix.shape[0]
            if channels != inputs:
                raise CovarianceError(
                    f"layer {name} has {inputs} inputs, but its covariance {channels} channels: "
                    "the covariances were taken from another model"
                )
        elif name not in covariances.left_out:
            raise CovarianceError(
                f"there is no covariance for layer {name}: calibrate the same model with the same "
                "targets, or leave the layer out of the targets"
            )
    if modules.keys().isdisjoint(covariances):
        raise CovarianceError("the covariances cover none of the target layers")


def check_gradients(
    modules: Mapping[str, nn.Module], covariances: CovarianceSet, config: CordaConfig
) -> None:
    """Makes sure that given covariances have the gradients that the configuration builds on."""
    if config.sides != "both":
        return
    for name, module in modules.items():
        found = covariances.gradients.get(name)
        if name in covariances and found is None:
            raise CovarianceError(
                f"there is no gradient for layer {name}, and {config.mode!r} with "
                f'sides="both" builds on it: calibrate(…, sides="both", labels="{config.labels}")'
            )
        if found is not None and found.mean.shape != linear_shape(module):
            raise CovarianceError(
                f"layer {name} is {linear_shape(module)}, but its gradient "
                f"{tuple(found.mean.shape)}: the gradients were taken from another model"
            )
    if config.mode == "task" and covariances.provenance.get("labels") == "sampled":
        raise CovarianceError(
            'the gradients are of labels that were sampled, whose mean is noise: mode "task" '
            'builds on calibrate(…, sides="both", labels="given")'
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
        f"singular, for one {name} ({note['tokens']} tokens, {note['channels']} channels): "
        f"{effect}; use more samples or longer sequences",
        RankDeficientWarning,
    )
