"""The factors of one layer's adapter: U and W → a LoRA that starts at zero."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from corda_kernels.arguments import instance_of, real_number, real_tensor
from corda_kernels.errors import CordaError, DecompositionError
from corda_kernels.linalg import CoSVD, End
from corda_kernels.precision import without_autocast

# Beyond it, and below one over it, factors in float32 overflow or vanish.
_MOST_HOLD = 1e30


class Mode(NamedTuple):
    """What a mode trains.

    Attributes:
        end: of the spectrum.
        rows: of A, and columns of B, for each component of an adapter beside the untouched base:
            two where a LoRA of W's own components is to start at zero.
        purpose: why these components, in words that follow them.
    """

    end: End
    rows: int
    purpose: str


MODES = {
    "kpm": Mode("smallest", 2, "so that what the calibration text holds is kept"),
    "ipm": Mode("largest", 2, "those that the calibration text uses most"),
    "task": Mode("largest", 1, "per unit of change to what is kept"),
}


@dataclass(frozen=True, eq=False)
class AdapterFactors:
    """A low-rank matrix scaling·B·A, or one for each expert of a parameter.

    Attributes:
        A: (rank, in), or (experts, rank, in).
        B: (out, rank), or (experts, out, rank).

        scaling: factor of the product, LoRA's alpha/rank.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A, for each expert."""
        return self.A.shape[-2]

    def to(self, where: torch.dtype | torch.device) -> AdapterFactors:
        """The same in another dtype or on another device."""
        return replace(self, A=self.A.to(where), B=self.B.to(where))

    def product(self) -> Tensor:
        """scaling·B·A (out, in), in float32."""
        return self.scaling * (self.B.float() @ self.A.float())


@dataclass(frozen=True, eq=False)
class LayerAdapter(AdapterFactors):
    """One layer's trained factors: the model computes W x + s·B A x.

    Attributes:
        initial: where W has lost a part s·B0 A0 to the adapter, that part; else None.
    """

    initial: AdapterFactors | None = None

    def to(self, where: torch.dtype | torch.device) -> LayerAdapter:
        """The same in another dtype or on another device."""
        initial = None if self.initial is None else self.initial.to(where)
        return replace(self, A=self.A.to(where), B=self.B.to(where), initial=initial)

    def detach(self) -> LayerAdapter:
        """The same, cut off from autograd."""
        return replace(self, A=self.A.detach(), B=self.B.detach())

    def change(self) -> AdapterFactors:
        """What training has added to the untouched base, as a LoRA.

        Beside a residual that is B A − B0 A0 = [B, ΔB][ΔA; A0], in which no two large products
        cancel.
        """
        if self.initial is None:
            return self
        # The weight lacks the initial product as it was, whatever the trained factors were cast to.
        wide = torch.promote_types(self.A.dtype, self.initial.A.dtype)
        A, B = self.A.to(wide), self.B.to(wide)
        A0, B0 = self.initial.A.to(A), self.initial.B.to(B)
        return AdapterFactors(torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1), self.scaling)


@without_autocast()
@torch.no_grad()
def adapter_factors(weight: Tensor, co_svd: CoSVD, *, hold: float = 1.0) -> AdapterFactors:
    """The factors of a LoRA that starts at exactly zero, of twice the decomposition's rank.

    Training the part B0 A0 = U Uᵀ W of the weight changes the weight by

        (B0 + ΔB)(A0 + ΔA) − B0 A0  =  B0 ΔA + ΔB A0 + ΔB ΔA

    The LoRA has B = [P, Q] and A = [R; S], hence the product P R + Q S, and starts at P ∝ U, Q = 0,
    R = 0, S ∝ Uᵀ W. So it is 0 at the start, and its first-order steps are the same: R gets the
    gradient Pᵀ G as ΔA gets B0ᵀ G, Q gets G Sᵀ as ΔB gets G A0ᵀ, and P and S get none until R and Q
    have moved.

    All columns of P and rows of S have the length hold/√3, and the scaling is 1/hold. With a hold
    of 1 this is the length of the rows of LoRA's own A, so that LoRA's learning rates suit. The
    larger `hold` is, the less an optimiser such as Adam turns P and S, and the closer the change
    stays to the tangent space {U X + Y Uᵀ W}.

    A component that W lacks (UᵀW vanishes) gets a row of zeros in S; its row of R can be trained.

    Args:
        weight: W (out, in), any floating dtype.
        co_svd: decomposition of W·C, with U (out, rank).
        hold: factor on the initial lengths, positive.

    Returns:
        A (2·rank, in) and B (out, 2·rank) in the decomposition's dtype, with scaling 1/hold.

    Raises:
        ConfigError: hold is not positive and finite.
        DecompositionError: the weight is no dense floating-point tensor, or the decomposition does
            not have its shape.

    """
    hold = check_hold(hold)
    rows, noise = component_rows(weight, co_svd)
    U = co_svd.U
    length = hold / 3**0.5
    P = length * U / U.norm(dim=0)
    lengths = rows.norm(dim=1)
    S = length * rows / torch.where(lengths > noise, lengths, torch.inf)[:, None]
    return AdapterFactors(
        torch.cat([torch.zeros_like(S), S]), torch.cat([P, torch.zeros_like(P)], 1), 1 / hold
    )


def task_factors(rows: Tensor, outputs: int) -> AdapterFactors:
    """A LoRA whose A is `rows`, scaled to the RMS of LoRA's own A, and whose B is zero.

    The root mean square of the entries of PEFT's A is 1/√(3·in). One factor for all rows keeps
    their lengths among each other, and A C Aᵀ a multiple of the identity where it was.

    Args:
        rows: (rank, in), see `steepest_rows`.
        outputs: of the layer.

    Returns:
        A (rank, in) and B (out, rank) in the rows' dtype, with scaling 1.
    """
    rank = len(rows)
    A = rows * ((rank / 3) ** 0.5 / torch.linalg.matrix_norm(rows))
    return AdapterFactors(A, rows.new_zeros(outputs, rank))


def lora_rows(mode: str, residual: str | None) -> int:
    """Rows of A, and columns of B, for each component; one where W has lost it to the adapter."""
    return MODES[mode].rows if residual is None else 1


def check_hold(hold: float) -> float:
    """`hold` as a float.

    Raises:
        ConfigError: it is not a positive finite number.
    """
    rule = "positive and finite, such as 1 or 16"
    return real_number("hold", hold, rule, lambda x: 1 / _MOST_HOLD <= x <= _MOST_HOLD)


def check_factors(factors: object, shape: tuple[int, ...], error: type[CordaError]) -> None:
    """Refuses what are no factors for a weight of `shape`.

    Raises:
        CordaError: of type `error`.
    """
    instance_of("factors", factors, AdapterFactors, error)
    A, B = factors.A, factors.B  # type: ignore[attr-defined]
    real_tensor("factor A", A, error)
    real_tensor("factor B", B, error)
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or shape != (len(B), A.shape[1]):
        raise error(
            f"A {tuple(A.shape)}, B {tuple(B.shape)} do not fit a weight {shape}: give its own"
        )


def component_rows(weight: Tensor, co_svd: CoSVD) -> tuple[Tensor, Tensor]:
    """Each component's row aᵢ = uᵢᵀW, (rank, in), and the length at which it is mere rounding.

    Raises:
        DecompositionError: the weight or the decomposition is none, or not of the other's size.
    """
    instance_of("co_svd", co_svd, CoSVD, DecompositionError)
    real_tensor("the weight", weight, DecompositionError)
    if weight.ndim != 2 or co_svd.U.ndim != 2 or len(weight) != len(co_svd.U):
        raise DecompositionError(
            f"a weight {tuple(weight.shape)} and a decomposition with U {tuple(co_svd.U.shape)} do "
            "not go together: give the weight (out, in) that was decomposed"
        )
    W = weight.to(co_svd.U.dtype)
    noise = max(W.shape) * torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W)
    if co_svd.dual is None:
        return co_svd.U.mT @ W, noise
    return co_svd.dual.mT @ W, noise * co_svd.dual.norm(dim=0)
