"""The ways to start an adapter that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from corda_kernels import CordaConfig, CovarianceSet, init_corda

from .forms import Form, Mode, attach, changes, components, share_outside

# Without a bound KPM++ gives some layers ten times the uniform rank and others nothing.
_MAX_RANK = 4
HOLDS = (1, 4, 8, 16)


@dataclass(frozen=True)
class Method:
    """How an adapter starts.

    Attributes:
        name: in tables and file names.
        learning_rates: the grid, the most promising first.
        rows: the LoRA's rank over the number of components.
        mode: of CorDA; None for the others.
        plus: whether it is CorDA++: covariances selected from candidates, ranks allocated.
        form: of CorDA's adapter; see `forms`.
        hold: of the plain form; None for the scale of the pair.
    """

    name: str
    learning_rates: tuple[float, ...]
    rows: int = 2
    mode: Mode | None = None
    plus: bool = False
    form: Form = "plain"
    hold: float | None = None


def _corda(mode: Mode, rate: float) -> list[Method]:
    """The methods of a mode; `rate` was the pair's best one."""
    published, others = (3e-5, 1e-4, 3e-4), (rate, rate / 3, 3 * rate)
    lora = (1e-3, 3e-4, 3e-3)
    return [
        Method(f"{mode}-published", published, 1, mode, form="published"),
        Method(f"{mode}-pair", others, 1, mode, form="pair"),
        Method(f"{mode}-plain", others, 2, mode),
        *(Method(f"{mode}-hold{hold}", lora, 2, mode, hold=hold) for hold in HOLDS),
        Method(f"{mode}++-hold1", lora, 2, mode, plus=True, hold=1),
    ]


METHODS = {
    method.name: method
    for method in (
        Method("lora", (1e-3, 3e-4, 3e-3)),
        Method("lora-r", (1e-3, 3e-4, 3e-3), 1),
        Method("pissa", (1e-4, 3e-4, 3e-5)),
        *_corda("kpm", 3e-4),
        *_corda("ipm", 1e-4),
    )
}


def start(
    method: Method,
    model: nn.Module,
    *,
    rank: int,
    seed: int,
    covariances: Callable[[Mode, bool], CovarianceSet],
) -> tuple[nn.Module, Callable[[], float] | None]:
    """The model with an adapter started by the method; at first it computes what the base does.

    Args:
        method: which.
        model: the base. All its linear layers but the output head are adapted.
        rank: components of every layer; CorDA++ shares out as many parameters.
        seed: of LoRA's A, and of PiSSA's randomised SVD.
        covariances: gives those of a mode, for CorDA++ or not.

    Returns:
        The model, and for one rank in all layers what measures the share of its change that lies
        outside the components' tangent spaces.
    """
    if method.mode is None:
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=method.rows * rank,
            lora_alpha=method.rows * rank,
            target_modules="all-linear",
            init_lora_weights="pissa_niter_16" if method.name == "pissa" else True,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora), None
    found = covariances(method.mode, method.plus)
    if method.plus:
        budget = CordaConfig(
            method.mode,
            rank=rank,
            budget=f"r={rank}",
            max_rank=_MAX_RANK * rank,
            hold=method.hold or 1.0,
            progress=False,
        )
        return init_corda(model, found, budget), None
    parts = components(model, found, method.mode, rank)
    if method.form == "published":
        config = CordaConfig(method.mode, rank=rank, residual="weight", progress=False)
        adapted = init_corda(model, found, config)
    elif method.hold is not None:
        config = CordaConfig(method.mode, rank=rank, hold=method.hold, progress=False)
        adapted = init_corda(model, found, config)
    else:
        adapted = attach(model, parts, method.form)
    return adapted, lambda: share_outside(parts, changes(adapted, parts))
