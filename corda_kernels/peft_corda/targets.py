"""Which layers PEFT would adapt, checked before any work for all that `corda_init` needs."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda_kernels.adapter import not_selectable
from corda_kernels.errors import RankError, TargetError
from corda_kernels.linears import is_linear, is_quantised, linear_weight

if TYPE_CHECKING:
    from peft import LoraConfig

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
    from peft.tuners.lora.model import LoraModel
    from peft.utils.other import get_pattern_key

    if config.target_parameters:
        raise TargetError(
            f"target_parameters={list(config.target_parameters)!r} adapts parameters that have no "
            'covariance, and PEFT cannot initialise them by "corda": leave it out, or adapt them '
            "by a second adapter with another init_lora_weights"
        )
    resolved = _resolve(config, model)
    targets = {}
    for name, module in model.named_modules():
        if is_linear(module) and LoraModel._check_target_module_exists(resolved, name):
            key = get_pattern_key(resolved.rank_pattern.keys(), name)
            targets[name] = Target(module, resolved.rank_pattern.get(key, resolved.r))
    if not targets:
        endings = {
            name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)
        }
        raise TargetError(
            f"no linear layer matches target_modules={config.target_modules!r}; the model's linear "
            f"layers end in: {', '.join(sorted(endings)[:20]) or '(it has none)'}"
        )
    for name, reason in not_selectable(model, targets).items():
        raise TargetError(
            f"layer {name} cannot be adapted through PEFT ({reason}): leave it out of "
            "target_modules"
        )
    _check_weights(targets)
    _check_unshared(model, targets)
    for name, target in targets.items():
        outputs, inputs = target.weight.shape
        if not 1 <= target.rank <= min(outputs, inputs):
            raise RankError(
                f"rank {target.rank} is not possible for layer {name} ({outputs} × {inputs}): set "
                "another in rank_pattern, or leave the layer out of target_modules"
            )
    return targets


def exclude(config: LoraConfig, names: Sequence[str]) -> None:
    """Adds layers to `config.exclude_modules`, in place: `get_peft_model` then passes them by."""
    present = config.exclude_modules or []
    if isinstance(present, str):
        config.exclude_modules = "|".join([f"(?:{present})", *map(re.escape, names)])
    else:
        config.exclude_modules = {*present, *names}


def _resolve(config: LoraConfig, model: nn.Module) -> LoraConfig:
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

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


def _check_weights(targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        weight: Any = target.module.weight
        if weight.device.type == "meta":
            raise TargetError(
                f"the weight of layer {name} is offloaded (device meta), where PEFT cannot change "
                "it: load the model with a device_map that keeps all targets on a device"
            )
        if weight.dtype not in _DTYPES or is_quantised(target.module):
            kind = type(weight).__name__ if is_quantised(target.module) else weight.dtype
            raise TargetError(
                f"layer {name} ({type(target.module).__name__}) holds its weight as {kind}, into "
                "which PEFT cannot write W − B·A: load the model in float32, float16 or bfloat16, "
                "and quantise the residual afterwards; or take init_corda, "
                "which leaves the base as it is"
            )


def _check_unshared(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Writing W − B·A into a shared weight would change the other module as well."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, target in targets.items():
        others = [owner for owner in owners[id(target.module.weight)] if owner != name]
        if others:
            raise TargetError(
                f"layer {name} is tied to {others[0]}, they hold one weight: CorDA would overwrite "
                "it for both; leave the layer out of target_modules, or untie the model "
                "(tie_word_embeddings=False)"
            )
