"""A model's adapter as plain data: factors by layer, and their record."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corda_kernels.adapter.factors import AdapterFactors
from corda_kernels.adapter.record import AdapterRecord
from corda_kernels.files import digest


@dataclass(frozen=True, eq=False)
class LayerAdapter:
    """One layer: the model computes W x + s·B A x.

    Attributes:
        trained: A, B and s.
        initial: where W has lost a part s·B0 A0 to the adapter, that part; else None.
    """

    trained: AdapterFactors
    initial: AdapterFactors | None = None

    @property
    def A(self) -> Tensor:  # noqa: N802
        """(rows, in), trained."""
        return self.trained.A

    @property
    def B(self) -> Tensor:  # noqa: N802
        """(out, rows), trained."""
        return self.trained.B

    @property
    def scaling(self) -> float:
        """LoRA's alpha/rank."""
        return self.trained.scaling

    def to(self, where: torch.dtype | torch.device) -> LayerAdapter:
        """The same in another dtype or on another device."""
        initial = None if self.initial is None else self.initial.to(where)
        return LayerAdapter(self.trained.to(where), initial)

    def change(self) -> AdapterFactors:
        """What training has added to the untouched base, as a LoRA.

        Beside a residual that is B A − B0 A0 = [B, ΔB][ΔA; A0], in which no two large products
        cancel.
        """
        if self.initial is None:
            return self.trained
        # The weight lacks the initial product as it was, whatever the trained factors were cast to.
        wide = torch.promote_types(self.A.dtype, self.initial.A.dtype)
        A, B = self.A.to(wide), self.B.to(wide)
        A0, B0 = self.initial.A.to(A), self.initial.B.to(B)
        return AdapterFactors(torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1), self.scaling)


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapters of all layers by module name, and their record."""

    layers: dict[str, LayerAdapter]
    record: AdapterRecord

    @property
    def initial(self) -> dict[str, AdapterFactors] | None:
        """What the adapter has taken out of each weight; None if it leaves the base untouched."""
        found = {name: layer.initial for name, layer in self.layers.items() if layer.initial}
        return found or None


def initial_checksum(initial: dict[str, AdapterFactors]) -> str:
    """SHA-256 of the parts that an adapter has taken out of the weights."""
    tensors: dict[str, Tensor] = {}
    for name, factors in initial.items():
        tensors |= {f"{name}.A": factors.A, f"{name}.B": factors.B}
    return digest(tensors, repr({name: initial[name].scaling for name in sorted(initial)}))
