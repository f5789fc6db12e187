"""The factors of one layer's adapter: U, Σ and W → a LoRA, or the published A and B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corda_kernels.arguments import instance_of, one_of, real_number, real_tensor
from corda_kernels.errors import ConfigError, CordaError, DecompositionError
from corda_kernels.linalg import CoSVD, regularized_inverse
from corda_kernels.linalg.operand import panels
from corda_kernels.precision import without_autocast

Reconstruction = Literal["projection", "inverse"]

RECONSTRUCTIONS = ("projection", "inverse")
# Beyond it, and below one over it, factors in float32 overflow or vanish.
_MOST_HOLD = 1e30


@dataclass(frozen=True, eq=False)
class AdapterFactors:
    """A low-rank matrix scaling·B·A.

    Attributes:
        A: (rank, in).
        B: (out, rank).
        scaling: factor of the product, LoRA's alpha/rank.
        damping: λ that the inverse of C took, as a multiple of the mean diagonal of C; None where
            nothing was inverted.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    damping: float | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Out, rows and in."""
        return self.B.shape[0], self.A.shape[0], self.A.shape[1]

    def to(self, where: torch.dtype | torch.device, *, copy: bool = False) -> AdapterFactors:
        """The same in another dtype or on another device."""
        A, B = self.A.to(where, copy=copy), self.B.to(where, copy=copy)
        return AdapterFactors(A, B, self.scaling, self.damping)

    def detach(self) -> AdapterFactors:
        """The same, cut off from autograd."""
        return AdapterFactors(self.A.detach(), self.B.detach(), self.scaling, self.damping)

    def product(self) -> Tensor:
        """scaling·B·A (out, in), in float32."""
        return self.scaling * (self.B.float() @ self.A.float())


@without_autocast()
@torch.no_grad()
def adapter_factors(
    weight: Tensor,  # (out, in)
    co_svd: CoSVD,
    *,
    hold: float = 1.0,
) -> AdapterFactors:
    """A LoRA of twice as many rows as there are components, which starts at exactly zero.

    Training a component B0 A0 = U Uᵀ W of the weight adds to it

        (B0 + ΔB)(A0 + ΔA) − B0 A0  =  B0 ΔA + ΔB A0 + ΔB ΔA

    The LoRA with B = [P, Q], A = [R; S] that starts at P ∝ U, Q = 0, R = 0, S ∝ Uᵀ W has the
    product P R + Q S. That is 0 at the start, and takes the same first-order steps: the gradient of
    R is Pᵀ G as that of ΔA is B0ᵀ G, the gradient of Q is G Sᵀ as that of ΔB is G A0ᵀ, and P and S
    have none until R and Q have moved.

    The columns of P and the rows of S all have the length hold/√3, which for a hold of 1 is that of
    the rows of LoRA's own A, and the scaling is 1/hold, so that learning rates of LoRA suit.
    The larger `hold` is, the smaller is the share by which an optimiser of Adam's kind turns P and
    S, and the closer the change stays to the tangent space {U X + Y Uᵀ W}.

    A component that W does not have (UᵀW vanishes) gets a row of zeros in S; its R can train.

    Args:
        weight: W (out, in), any floating dtype.
        co_svd: its decomposition, U (out, rank).
        hold: positive.

    Returns:
        A (2·rank, in) and B (out, 2·rank) in the decomposition's dtype, with scaling 1/hold.

    Raises:
        ConfigError: hold is not positive and finite.
        DecompositionError: the weight is no dense tensor of floating numbers, or the decomposition
            is not that of one of its shape.
    """
    hold = check_hold(hold)
    _check_fits(weight, co_svd)
    U = co_svd.U
    rows, noise = _rows(weight, co_svd)
    length = hold / 3**0.5
    P = length * U / U.norm(dim=0)
    lengths = rows.norm(dim=1)
    S = length * rows / torch.where(lengths > noise, lengths, torch.inf)[:, None]
    return AdapterFactors(
        torch.cat([torch.zeros_like(S), S]), torch.cat([P, torch.zeros_like(P)], 1), 1 / hold
    )


def check_hold(hold: float) -> float:
    """`hold` as a float.

    Raises:
        ConfigError: it is not a positive finite number.
    """
    rule = "positive and finite, such as 1 or 8"
    return real_number("hold", hold, rule, lambda x: 1 / _MOST_HOLD <= x <= _MOST_HOLD)


def check_factors(factors: object, shape: tuple[int, ...], error: type[CordaError]) -> None:
    """Refuses what are no factors for a weight of `shape`.

    Raises:
        CordaError: of type `error`.
    """
    instance_of("factors", factors, AdapterFactors, error)
    A, B = factors.A, factors.B  # type: ignore[attr-defined]
    for name, factor in (("A", A), ("B", B)):
        real_tensor(f"factor {name}", factor, error)
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or shape != (len(B), A.shape[1]):
        raise error(
            f"factors A {tuple(A.shape)} and B {tuple(B.shape)} are not those of a weight {shape}: "
            "give those of this layer"
        )


def _check_fits(weight: Tensor, co_svd: CoSVD) -> None:
    instance_of("co_svd", co_svd, CoSVD, DecompositionError)
    real_tensor("the weight", weight, DecompositionError)
    if weight.ndim != 2 or co_svd.U.ndim != 2 or len(weight) != len(co_svd.U):
        raise DecompositionError(
            f"a weight {tuple(weight.shape)} and a decomposition with U {tuple(co_svd.U.shape)} do "
            "not go together: give the weight (out, in) that was decomposed"
        )


@without_autocast()
@torch.no_grad()
def published_factors(
    weight: Tensor,  # (out, in)
    co_svd: CoSVD,
    *,
    reconstruction: Reconstruction = "projection",
    covariance: Tensor | None = None,  # (in, in)
) -> AdapterFactors:
    """CorDA's A and B as published: a part B·A = U Uᵀ W of the weight, to be taken out of it.

    This is B = U√Σ, A = √Σ VᵀC⁻¹ without its inverse, since VᵀC⁻¹ = Σ⁻¹UᵀW: exact where C is
    invertible, and defined where it is not. With aᵢ = uᵢᵀW the factors are Aᵢ = aᵢ/βᵢ, Bᵢ = βᵢuᵢ,
    where βᵢ = √σᵢ is kept above 1e-3·√‖aᵢ‖. A component of W that vanishes gets A = 0 and the
    median β, so that it can still train. Of a decomposition with an output covariance D the
    projection is oblique, U (D U)ᵀ W, and aᵢ = (D uᵢ)ᵀ W.

    With the reconstruction as published, aᵢ = σᵢvᵢᵀ(C + λI)⁻¹ = uᵢᵀW(C + λI)·(C + λI)⁻¹. It is the
    same but for rounding, which grows with the condition of C (`benches/reconstruction.py`), and
    components that C does not see at all vanish.

    Args:
        weight: (out, in), any floating dtype.
        co_svd: its decomposition, U (out, rank).
        reconstruction: "projection", or "inverse" for A through C⁻¹ as published.
        covariance: C (in, in), for reconstruction "inverse" only. λ is the decomposition's; where
            that has none, the inverse takes the least that works, `AdapterFactors.damping`.

    Returns:
        A (rank, in) and B (out, rank) in the decomposition's dtype, with scaling 1.

    Raises:
        ConfigError: reconstruction is unknown, or the covariance is missing or out of place.
        DecompositionError: an input is no dense tensor of floating numbers, the decomposition or
            the covariance is of another size, or the covariance cannot be inverted.

    Source: CorDA (arXiv:2406.05223), equations 3 to 5.
    """
    one_of("reconstruction", reconstruction, RECONSTRUCTIONS)
    _check_fits(weight, co_svd)
    if (covariance is not None) != (reconstruction == "inverse"):
        raise ConfigError('reconstruction="inverse", and no other, needs the covariance')
    rows, noise = _rows(weight, co_svd)
    damping = None
    if covariance is not None:
        rows, damping = _through_inverse(rows, covariance, float(co_svd.damping))
    strength = rows.norm(dim=1)
    live = strength > noise
    # The columns of U have length 1 but where there is an output covariance.
    beta = torch.maximum(co_svd.S.sqrt(), 1e-3 * (strength / co_svd.U.norm(dim=0)).sqrt())
    stand_in = beta[live].median() if bool(live.any()) else beta.new_tensor(1.0)
    beta = torch.where(live, beta, stand_in)
    A = torch.where(live[:, None], rows / beta[:, None], 0.0)
    return AdapterFactors(A, co_svd.U * beta, damping=damping)


def _rows(weight: Tensor, co_svd: CoSVD) -> tuple[Tensor, Tensor]:
    """Each component's row aᵢ = uᵢᵀW, (rank, in), and the length at which it is mere rounding."""
    W = weight.to(co_svd.U.dtype)
    noise = max(W.shape) * torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W)
    if co_svd.dual is None:
        return co_svd.U.mT @ W, noise
    return co_svd.dual.mT @ W, noise * co_svd.dual.norm(dim=0)


def _through_inverse(
    projected: Tensor,  # UᵀW, (rank, in)
    covariance: Tensor,  # (in, in)
    damping: float,
) -> tuple[Tensor, float]:
    """ΣVᵀ(C + λI)⁻¹ with ΣVᵀ = UᵀW(C + λI), and the λ of the inverse.

    Either λ is a multiple of the mean diagonal of C; they differ only where the first, `damping`,
    is 0 and C cannot be inverted as it is.
    """
    inputs = projected.shape[1]
    real_tensor("the covariance", covariance, DecompositionError)
    if covariance.shape != (inputs, inputs):
        raise DecompositionError(
            f"a weight of {inputs} inputs needs a covariance ({inputs}, {inputs}), "
            f"got {tuple(covariance.shape)}"
        )
    C = covariance.to(projected)
    image = projected @ C + damping * C.diagonal().mean() * projected
    found = regularized_inverse(C, damping=damping or None)
    return image @ found.inverse, float(found.damping)


@without_autocast()
@torch.no_grad()
def residual(weight: Tensor, factors: AdapterFactors) -> Tensor:
    """The frozen part W' = W − scaling·B·A (out, in), summed in float64, in the weight's dtype.

    Raises:
        DecompositionError: the weight is no dense tensor of floating numbers, or the factors are
            none, or of another layer's size.
    """
    real_tensor("the weight", weight, DecompositionError)
    check_factors(factors, tuple(weight.shape), DecompositionError)
    A, B = (factor.to(weight.device, torch.float64) for factor in (factors.A, factors.B))
    left = torch.empty_like(weight)
    for rows in panels(weight.shape[0], weight.device):
        part = weight[rows].to(torch.float64, copy=True)
        left[rows] = part.addmm_(B[rows], A, alpha=-factors.scaling)
    return left
