"""Forms of an adapter that the package does not make, and how far any form leaves its components.

Whatever the form, what training adds to a weight is

    (B0 + ΔB)(A0 + ΔA) − B0 A0  =  B0 ΔA + ΔB A0 + ΔB ΔA

published   A and B are trained, W − B0 A0 stands in the base (`residual="weight"`)
pair        A and B are trained, −B0 and A0 stand beside them as a second, frozen adapter
plain       one LoRA of twice the rank, [P, Q][R; S], starts at [B0, 0][0; A0]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corda_kernels import CovarianceSet, co_svd_layers
from corda_kernels.adapter.factors import MODES
from corda_kernels.linears import linear_weight
from corda_kernels.targets import target_linears

Form = Literal["published", "pair", "plain"]
Mode = Literal["kpm", "ipm"]
_DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Component:
    """What of one layer is trained.

    Attributes:
        U: (out, rank), orthonormal columns.
        rows: (rank, in), Uᵀ W.
    """

    U: Tensor
    rows: Tensor

    def even(self) -> tuple[Tensor, Tensor]:
        """A0 (rank, in) and B0 (out, rank) with B0 A0 = U Uᵀ W, of equal RMS."""
        beta = self.rows.norm(dim=1).sqrt() * (self.U.shape[0] / self.rows.shape[1]) ** 0.25
        return self.rows / beta[:, None], self.U * beta

    def outside(self, change: Tensor) -> Tensor:
        """The part (out, in) of a change that is not of the form B0 X + Y A0."""
        V = torch.linalg.qr(self.rows.mT).Q
        left = change - self.U @ (self.U.mT @ change)
        return left - (left @ V) @ V.mT


def components(
    model: nn.Module, covariances: CovarianceSet, mode: Mode, rank: int
) -> dict[str, Component]:
    """The components of every linear layer but the output head, in float64."""
    weights = {name: linear_weight(each).detach() for name, each in target_linears(model).items()}
    found = co_svd_layers(
        weights,
        {name: covariances[name].matrix for name in weights},
        rank=dict.fromkeys(weights, rank),
        which=MODES[mode].end,
        damping=_DAMPING,
    )
    return {
        name: Component(part.U.double(), part.U.double().mT @ weights[name].double())
        for name, part in found
    }


@torch.no_grad()
def attach(model: nn.Module, parts: Mapping[str, Component], form: Form) -> nn.Module:
    """A PeftModel that computes what the base does, in the form "pair" or "plain".

    Args:
        model: the base, float32; wrapped in place.
        parts: by layer.
        form: either has A0 and B0 of equal RMS, and scaling 1.
    """
    rank = next(iter(parts.values())).U.shape[1] * (2 if form == "plain" else 1)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(parts), task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config)
    if form == "pair":
        wrapped.add_adapter("initial", config)
    for name, part in parts.items():
        layer = wrapped.get_base_model().get_submodule(name)
        A, B = part.even()
        if form == "pair":
            layer.lora_A["initial"].weight.copy_(A)
            layer.lora_B["initial"].weight.copy_(-B)
        else:
            A, B = torch.cat([torch.zeros_like(A), A]), torch.cat([B, torch.zeros_like(B)], 1)
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
    if form == "pair":
        wrapped.base_model.set_adapter(["default", "initial"])
        for name, parameter in wrapped.named_parameters():
            if ".initial." in name:
                parameter.requires_grad_(False)
    adapted: nn.Module = wrapped
    return adapted


@torch.no_grad()
def changes(model: Any, names: Mapping[str, Component]) -> dict[str, Tensor]:
    """What training has added to each weight of a PeftModel in any form, (out, in) float64."""
    initial = getattr(model, "corda_initial", None) or {}
    found = {}
    for name in names:
        layer = model.get_base_model().get_submodule(name)
        total: Any = 0.0
        for adapter in layer.active_adapters:
            A, B = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
            total = total + layer.scaling[adapter] * (B @ A)
        if name in initial:
            total = total - initial[name].scaling * (
                initial[name].B.double() @ initial[name].A.double()
            )
        found[name] = total
    return found


def share_outside(parts: Mapping[str, Component], found: Mapping[str, Tensor]) -> float:
    """The share of the changes' energy that lies outside the components' tangent spaces."""
    outside = sum(float(part.outside(found[name]).square().sum()) for name, part in parts.items())
    return outside / sum(float(change.square().sum()) for change in found.values())
