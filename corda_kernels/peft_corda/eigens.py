"""What PEFT's `corda_init` makes an adapter of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corda_kernels.adapter import published_factors
from corda_kernels.linalg import CoSVD


@dataclass(eq=False)
class CordaEigens:
    """One layer's components, as PEFT names them; it makes B = U√S and A = √S Vᵀ of them.

    Attributes:
        S_WC: (r,) float32, descending.
        U_WC: (out, r) float32.
        V_WC: (in, r) float32, V multiplied by C⁻¹.
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def corda_eigens(weight: Tensor, part: CoSVD) -> CordaEigens:
    """PEFT's form of a decomposition, with its inverse of C taken from C⁻¹V = WᵀUΣ⁻¹.

    Every number is finite, whatever C is: where σ vanishes, `published_factors` says what stands in
    for it. The tensors are new, for `corda_init` divides S in place.

    Args:
        weight: (out, in), any floating dtype.
        part: its decomposition, U (out, r).
    """
    factors = published_factors(weight, part)
    beta = factors.B.norm(dim=0)
    order = beta.argsort(descending=True, stable=True)
    S = beta[order].square()
    U = part.U[:, order]
    V = (factors.A[order] / beta[order, None]).mT
    return CordaEigens(S.float(), U.float().contiguous(), V.float().contiguous())
