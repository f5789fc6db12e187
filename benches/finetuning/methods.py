"""The ways to start an adapter that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from corda_kernels import CordaConfig, CovarianceSet, adapter_factors, init_corda
from corda_kernels.adapter.factors import task_factors
from corda_kernels.linalg import CoSVD
from corda_kernels.linears import linear_weight
from corda_kernels.targets import target_linears

from .forms import Form, Mode, attach, components

# Without a bound KPM++ gives some layers ten times the uniform rank and others nothing.
_MAX_RANK = 4
HOLDS = (1, 4, 8, 16)
_DAMPING = 0.01
# Of LoRA, and of what starts at its scale.
_LORA = (1e-3, 3e-4, 3e-3, 1e-4, 3e-5)

Sample = Literal["kpm", "kpm++", "kpm-both", "ipm", "ipm++", "task"]


@dataclass(frozen=True)
class Method:
    """How an adapter starts.

    Attributes:
        name: in tables and file names.
        learning_rates: the grid, the most promising first.
        rows: the LoRA's rank over the number of components.
        mode: of CorDA; None for the others.
        samples: whose covariances it is made of; in mode "task" the task's, then what is kept.
        form: of CorDA's adapter; see `forms`.
        hold: of the plain form; None for the scale of the pair.
        freeze_a: whether B alone is trained.
    """

    name: str
    learning_rates: tuple[float, ...] = _LORA
    rows: int = 2
    mode: Literal["kpm", "ipm", "task"] | None = None
    samples: tuple[Sample, ...] = ()
    form: Form = "plain"
    hold: float | None = None
    freeze_a: bool = False

    @property
    def stored(self) -> bool:
        """Whether it is an adapter of the package, the same for every seed."""
        return self.mode == "task" or self.form == "published" or self.hold is not None


def _corda(mode: Mode, rate: float) -> list[Method]:
    """The methods of a mode; `rate` was the pair's best one."""
    published, others = (3e-5, 1e-4, 3e-4, 1e-5, 1e-3), (rate, rate / 3, 3 * rate)
    of: dict[str, Any] = {"mode": mode, "samples": (mode,)}
    return [
        Method(f"{mode}-published", published, 1, form="published", **of),
        Method(f"{mode}-pair", others, 1, form="pair", **of),
        Method(f"{mode}-plain", others, **of),
        *(Method(f"{mode}-hold{hold}", hold=hold, **of) for hold in HOLDS),
        Method(f"{mode}++-hold1", mode=mode, samples=(f"{mode}++",), hold=1),
    ]


METHODS = {
    method.name: method
    for method in (
        Method("lora"),
        Method("lora-r", rows=1),
        Method("pissa", (1e-4, 3e-4, 3e-5, 1e-5, 1e-3)),
        *_corda("kpm", 3e-4),
        *_corda("ipm", 1e-4),
        Method("kpm-both", mode="kpm", samples=("kpm-both",), hold=1),
        Method("task", mode="task", samples=("task",)),
        Method("task-keep", mode="task", samples=("task", "kpm")),
        Method("task-frozen", mode="task", samples=("task", "kpm"), freeze_a=True),
        Method("white", samples=("kpm",)),
        Method("random"),
    )
}


def start(
    method: Method,
    model: nn.Module,
    *,
    rank: int,
    seed: int,
    covariances: Callable[[Sample], CovarianceSet],
) -> nn.Module:
    """The model with an adapter started by the method; at first it computes what the base does.

    Args:
        method: which.
        model: the base. All its linear layers but the output head are adapted.
        rank: components of every layer; CorDA++ shares out as many parameters.
        seed: of LoRA's A, of PiSSA's randomised SVD, and of random components.
        covariances: gives those of a sample.
    """
    if method.mode is None:
        torch.manual_seed(seed)
        return _without_corda(method, model, rank, [covariances(name) for name in method.samples])
    found, *kept = [covariances(name) for name in method.samples]
    if method.mode == "task":
        config = CordaConfig(
            "task", rank=method.rows * rank, freeze_a=method.freeze_a, progress=False
        )
        return init_corda(model, found, config, keep=kept[0] if kept else None)
    if not method.stored:
        return attach(model, components(model, found, method.mode, rank), method.form)
    options: dict[str, Any] = {"residual": "weight"} if method.form == "published" else {}
    if method.samples[0].endswith("++"):
        options = {"budget": f"r={rank}", "max_rank": _MAX_RANK * rank}
    if method.samples[0].endswith("-both"):
        options = {"sides": "both"}
    hold = 1.0 if method.hold is None else method.hold
    config = CordaConfig(method.mode, rank=rank, hold=hold, progress=False, **options)
    return init_corda(model, found, config)


@torch.no_grad()
def _without_corda(
    method: Method, model: nn.Module, rank: int, kept: Sequence[CovarianceSet]
) -> nn.Module:
    """LoRA, PiSSA, and the controls of what CorDA chooses.

    white   LoRA's own A times C^-½ of what is kept, scaled back to LoRA's RMS: what remains of a
            task start without its gradient
    random  KPM and IPM but for the choice of components: U is random, all else is made of it as
            they do, S from the rows of Uᵀ W, and all lengths are theirs
    """
    rows = method.rows * rank
    config = LoraConfig(
        r=rows,
        lora_alpha=rows,
        target_modules="all-linear",
        init_lora_weights="pissa_niter_16" if method.name == "pissa" else True,
        task_type="CAUSAL_LM",
    )
    controlled = target_linears(model) if method.name in ("white", "random") else {}
    adapted: Any = get_peft_model(model, config)
    for name, layer in controlled.items():
        wrapped = adapted.get_base_model().get_submodule(name)
        A, B = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
        if method.name == "white":
            C = kept[0][name].matrix.double().to(A.device)
            C.diagonal().add_(_DAMPING * C.diagonal().mean())
            root = torch.linalg.cholesky(C)
            whitened = torch.linalg.solve_triangular(root.mT, A.double().mT, upper=True).mT
            A.copy_(task_factors(whitened, len(B)).A)
        else:
            weight = linear_weight(layer).detach()
            U = torch.linalg.qr(torch.randn(len(weight), rank).double()).Q.to(weight.device)
            none = torch.zeros((), dtype=torch.float64)
            factors = adapter_factors(weight, CoSVD(U, U.new_ones(rank), none, none))
            A.copy_(factors.A)
            B.copy_(factors.B)
    return adapted
