"""Refusals before the work: which layers an adapter gets, and whether it can have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from corda_kernels.adapter import has_adapter, not_selectable, residual_marker
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
from corda_kernels.init.config import CordaConfig
from corda_kernels.linears import check_writable, is_linear, is_quantised, linear_shape
from corda_kernels.models import check_unshared, check_unwrapped, target_linears, unreached_weights
from corda_kernels.planning.ranks import check_guaranteed, parse_budget, uniform_budget


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
        raise ModelError("the model carries an adapter: load the base afresh, or merge the adapter")
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
    shapes = {name: linear_shape(module) for name, module in modules.items()}
    if config.budget is not None:
        most = adapter_parameters(model, modules, config)
        check_guaranteed(shapes, most, *config.bounds, config.rows)
        return modules
    for name, shape in shapes.items():
        if config.rank > min(shape):
            raise RankError(
                f"rank {config.rank} is not possible for layer {name} ({shape[0]} × {shape[1]}): "
                f"choose one between 1 and {min(shape)}, or leave the layer out"
            )
    return modules


def _check_saved(model: nn.Module, modules: Mapping[str, nn.Module], saved: Sequence[str]) -> None:
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
                    "leave it out by exclude_modules, or do not name it"
                )


def adapter_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], config: CordaConfig
) -> int:
    """How many parameters an adapter of `modules` may have at most.

    Raises:
        ConfigError: the budget cannot be read.
    """
    shapes = {name: linear_shape(module) for name, module in modules.items()}
    if config.budget is None:
        return uniform_budget(shapes, config.rank, config.rows)
    whole = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if is_linear(module) and is_quantised(module):  # of four bits two weights are one number
            whole += math.prod(linear_shape(module)) - module.weight.numel()  # type: ignore[operator]
    return parse_budget(config.budget, shapes, whole, config.rows)


def warn_left_out(model: nn.Module, config: CordaConfig, modules: Mapping[str, nn.Module]) -> None:
    """Says which layers of "all-linear" `check_targets` has left out, as PEFT adapts none of them.

    What no calibration reaches is told with them, since the calibration is then given names.
    """
    names = target_linears(model, config.targets, config.exclude_modules).keys() - modules.keys()
    if names:
        reasons = not_selectable(model, sorted(names)) | unreached_weights(model)
        warn(
            f"{len(reasons)} layers or weights get no adapter, for one {min(names)}: "
            f"{reasons[min(names)]}; init_corda(…, use_peft=False) adapts {len(names)} of them",
            LeftOutWarning,
        )


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
    modules: Mapping[str, nn.Module], inputs: Sequence[Mapping[str, Any]], damping: float | None
) -> None:
    """Says which covariances are singular for want of tokens, and what stood in for the rest.

    Args:
        modules: the layers that it is about.
        inputs: what `measured_input` gave of each covariance.
        damping: of all of them.
    """
    notes = [(note, name) for note in inputs for name in note["layers"] if name in modules]
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
