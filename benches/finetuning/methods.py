"""The ways to start an adapter that are compared, all with the same number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from corda_kernels import CordaConfig, CovarianceSet, init_corda
from corda_kernels.initialization.factors import Balance, Step

Mode = Literal["kpm", "ipm"]
# Without a bound KPM++ gives some layers ten times the uniform rank and others nothing.
_MAX_RANK = 4


@dataclass(frozen=True)
class Method:
    """How an adapter starts.

    Attributes:
        name: in tables and file names.
        learning_rates: the grid, the most promising first.
        mode: of CorDA; None for the others.
        plus: whether it is CorDA++: covariances selected from candidates, ranks allocated.
        balance: of CorDA's factors.
        step: of CorDA's factors.
    """

    name: str
    learning_rates: tuple[float, ...]
    mode: Mode | None = None
    plus: bool = False
    balance: Balance = "even"
    step: Step = None


def _corda(mode: Mode, plus: bool, balance: Balance, step: Step, *rates: float) -> Method:
    parts = (mode + "++" * plus, balance, step)
    return Method("-".join(filter(None, parts)), rates, mode, plus, balance, step)


# Adam's first step is 16 (IPM) or 61 (KPM) times LoRA's with balance "paper", 7 or 2.6 times with
# "even", LoRA's own with step "lora": each method's first rate makes it about LoRA's at 1e-3.
METHODS = {
    method.name: method
    for method in (
        Method("lora", (1e-3, 3e-4, 3e-3)),
        Method("pissa", (1e-4, 3e-4, 3e-5)),
        *(
            method
            for plus in (False, True)
            for method in (
                _corda("kpm", plus, "paper", None, 3e-5, 1e-4, 3e-4),
                _corda("kpm", plus, "even", None, 3e-4, 1e-3, 1e-4),
                _corda("ipm", plus, "paper", None, 1e-4, 3e-4, 3e-5),
                _corda("ipm", plus, "even", None, 1e-4, 3e-4, 3e-5),
                _corda("kpm", plus, "even", "lora", 1e-3, 3e-4, 3e-3),
                _corda("ipm", plus, "even", "lora", 1e-3, 3e-4, 3e-3),
            )
        ),
    )
}


def start(
    method: Method,
    model: nn.Module,
    *,
    rank: int,
    seed: int,
    covariances: Callable[[Mode, bool], CovarianceSet],
) -> nn.Module:
    """The model with an adapter started by the method; at first it computes what the base does.

    Args:
        method: which.
        model: the base. All its linear layers but the output head are adapted.
        rank: of every layer; CorDA++ shares out as many parameters.
        seed: of LoRA's A, and of PiSSA's randomised SVD.
        covariances: gives those of a mode, for CorDA++ or not.
    """
    if method.mode is None:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules="all-linear",
            init_lora_weights="pissa_niter_16" if method.name == "pissa" else True,
            task_type="CAUSAL_LM",
        )
        adapted: nn.Module = get_peft_model(model, config)
        return adapted
    ranks: dict[str, Any] = {"rank": rank}
    if method.plus:
        ranks |= {"budget": f"r={rank}", "max_rank": _MAX_RANK * rank}
    config = CordaConfig(
        method.mode,
        **ranks,
        balance=method.balance,
        step=method.step,
        # As published, and one product less at every step; the outputs are the same.
        residual="weight",
        progress=False,
    )
    return init_corda(model, covariances(method.mode, method.plus), config)
