"""Which layers PEFT would adapt, checked before any work for all that `corda_init` needs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from corda_kernels.adapter.experts import not_selectable
from corda_kernels.errors import RankError, TargetError
from corda_kernels.linears import is_quantised, linear_layers, linear_weight
from corda_kernels.targets import check_unshared, no_match

# What PEFT's corda_init accepts.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Target:
    """A layer to adapt.

    Attributes:
        module: nn.Linear or Conv1D.
        rank: of its adapter.
    """

    module: nn.Module
    rank: int

    @property
    def weight(self) -> Tensor:
        """(out, in), a view, in Linear's orientation."""
        return linear_weight(self.module).detach()


def corda_targets(model: nn.Module, config: LoraConfig) -> dict[str, Target]:
    """The layers that `get_peft_model(model, config)` will initialise by CorDA, by name.

    Args:
        model: the base, without an adapter.
        config: PEFT's; `target_modules=None` and "all-linear" are resolved as `get_peft_model`
            does, in a copy.

    Raises:
        TargetError: no layer matches; or one is quantised, offloaded, or shares its weight with
            another module, all of which `corda_init` would fail on or spoil; or parameters are
            targets, as fused experts are.
        RankError: a rank is not possible for its layer.
    """
    if config.target_parameters:
        raise TargetError(
            f"target_parameters={list(config.target_parameters)!r} adapts parameters that have no "
            'covariance, and PEFT cannot initialise them by "corda": leave it out, or adapt them '
            "by a second adapter with another init_lora_weights"
        )
    resolved = _resolve(config, model)
    linears = linear_layers(model)
    targets = {}
    for name, module in linears.items():
        if LoraModel._check_target_module_exists(resolved, name):
            key = get_pattern_key(resolved.rank_pattern.keys(), name)
            targets[name] = Target(module, resolved.rank_pattern.get(key, resolved.r))
    for name, module in model.named_modules():
        other = isinstance(module, nn.Linear) and name not in linears
        if other and LoraModel._check_target_module_exists(resolved, name):
            raise TargetError(
                f"layer {name} ({type(module).__name__}) is not called as a plain linear layer: "
                "leave it out by exclude_modules"
            )
    if not targets:
        raise no_match("target_modules", config.target_modules, linears)
    check_unshared(model, {name: target.module for name, target in targets.items()})
    unselectable = not_selectable(model, targets)
    for name, target in targets.items():
        module, weight, wrong = target.module, target.module.weight, ""
        if name in unselectable:
            wrong = f"cannot be adapted through PEFT ({unselectable[name]}): leave it out"
        elif weight.is_meta:
            wrong = "is offloaded: load the model with a device_map that keeps it on a device"
        elif weight.dtype not in _DTYPES or is_quantised(module):
            kind = type(weight).__name__ if is_quantised(module) else weight.dtype
            wrong = (
                f"({type(module).__name__}) holds its weight as {kind}, into which PEFT cannot "
                "write W − B·A: load it in float32, float16 or bfloat16, or take init_corda, which "
                "leaves the base as it is"
            )
        if wrong:
            raise TargetError(f"layer {name} {wrong}")
        outputs, inputs = target.weight.shape
        if not 1 <= target.rank <= min(outputs, inputs):
            raise RankError(
                f"rank {target.rank} is not possible for layer {name} ({outputs} × {inputs}): set "
                "another in rank_pattern, or leave the layer out of target_modules"
            )
    return targets


def _resolve(config: LoraConfig, model: nn.Module) -> LoraConfig:
    # PEFT's own, which another version may have elsewhere: `patch_peft` warns of those first.
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    resolved = copy.copy(config)
    if resolved.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        usual: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if usual is None:
            raise TargetError(
                f"target_modules is not set, and PEFT has no default for model type {kind!r}: name "
                'the layers, or set target_modules="all-linear"'
            )
        resolved.target_modules = usual if isinstance(usual, str) else set(usual)
    return _maybe_include_all_linear_layers(resolved, model)
