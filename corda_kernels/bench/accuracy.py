"""How far a decomposition is from a float64 reference, in the terms that matter to an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Reference:
    """One layer in float64, decomposed by a dense SVD.

    Attributes:
        W: (out, in), the weight.
        M: (out, in), W·(C + λI).
        U: (out, R), left singular vectors of M; R = min(out, in).
        S: (R), its singular values, descending.
    """

    W: Tensor
    M: Tensor
    U: Tensor
    S: Tensor


def reference(
    weight: Tensor,  # (out, in)
    covariance: Tensor,  # (in, in)
    damping: float | None,
) -> Reference:
    """Decomposes W·(C + λI) by torch.linalg.svd of its triangular factor, λ = damping·mean diag C.

    With a condition of 1e8 to 1e12 a plain SVD of M may be off by eps·cond at the small end, by as
    much as is to be measured. The errors of QR of Mᵀ, which goes first, follow the norms of the
    rows of M one by one, and the SVD of the triangle does better than its bound: an inverse
    iteration agrees with it to 1e-8 in the energy of the tail at conditions of 1e11. A tall W is
    replaced by its own triangular factor, so that U lies in the range of W also where C is
    singular.
    """
    W, C = weight.double(), covariance.to(weight.device, torch.float64, copy=True)
    if damping:
        C.diagonal().add_(damping * C.diagonal().mean())
    Q, inner = torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)
    U, S, _ = torch.linalg.svd(torch.linalg.qr((inner @ C).mT, mode="r").R.mT)
    return Reference(W, W @ C, U if Q is None else Q @ U, S)


def adapter_error(BA: Tensor, exact: Reference, which: str, rank: int) -> float:
    """‖BA − BA_ref‖/‖BA_ref‖ (Frobenius) for BA (out, in) = B A, BA_ref = U_I U_Iᵀ W."""
    U = exact.U[:, :rank] if which == "largest" else exact.U[:, -rank:]
    expected = U @ (U.mT @ exact.W)
    return float((BA.double() - expected).norm() / expected.norm())


def tail_energy_ratio(U: Tensor, exact: Reference) -> float:
    """‖UᵀM‖_F over the least possible, (Σ σ²)^½ of the smallest, for U (out, rank); 1 is optimal.

    Energies up to rank·(R·eps·σ₁)² are rounding: of exactly null directions both count as that.
    """
    rank = U.shape[-1]
    level = rank * float(exact.S.shape[0] * EPS * exact.S[0]) ** 2
    energy = float((U.double().mT @ exact.M).square().sum())
    least = float(exact.S[-rank:].square().sum())
    if max(energy, least) <= level:
        return 1.0
    return math.sqrt(max(energy, level) / max(least, level))
