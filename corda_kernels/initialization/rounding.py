"""The rounding of a residual, and factors that make up for it as far as their rank allows."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.initialization.factors import AdapterFactors, residual
from corda_kernels.precision import without_autocast

# Of C, times its mean diagonal, so that directions that the text never touched count a little.
_DAMPING = 0.01
# Eigenvalues of the factors' Gram matrices below this share of the largest are noise.
_NOISE = 1e-12


@without_autocast()
@torch.no_grad()
def compensated(weight: Tensor, factors: AdapterFactors, covariance: Tensor) -> AdapterFactors:
    """Factors to start training from beside the rounded residual of `factors`.

    The residual W' of the given A, B is stored in the weight's dtype, and W' + s·B·A misses W by
    its rounding E. B takes up what of E lies in the row space of A, as seen by the inputs, then A
    what is left in the column space of B:

        B ← B − E C Aᵀ (A C Aᵀ)⁻¹ / s        A ← A − (Bᵀ B)⁻¹ Bᵀ E / s

    Each is the least-squares solution of tr(E C Eᵀ), the mean square error of the layer's output,
    which neither can make larger.

    Args:
        weight: (out, in), in the dtype that the residual will be stored in.
        factors: as initialised, which the residual is computed from.
        covariance: C (in, in) of the layer's inputs.

    Returns:
        A and B in float64; the given ones where the dtype is no narrower than theirs.
    """
    if torch.finfo(weight.dtype).bits >= torch.finfo(factors.A.dtype).bits:
        return factors
    W = weight.double()
    taken = residual(weight, factors).double() - W  # W' − W
    A, B, scaling = factors.A.double(), factors.B.double(), factors.scaling
    C = covariance.to(W)
    seen = A @ C + _DAMPING * C.diagonal().mean() * A
    error = taken + scaling * (B @ A)
    B = B - (error @ seen.mT) @ _inverse(seen @ A.mT) / scaling
    error = taken + scaling * (B @ A)
    A = A - _inverse(B.mT @ B) @ (B.mT @ error) / scaling
    return AdapterFactors(A, B, scaling, factors.damping)


def _inverse(gram: Tensor) -> Tensor:
    """Pseudoinverse of a Gram matrix (rank, rank), whatever the lengths of its vectors."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    units = torch.where(lengths > 0, 1 / lengths, 0.0)
    scaled = units[:, None] * (gram + gram.mT) / 2 * units
    inverse: Tensor = torch.linalg.pinv(scaled, hermitian=True, rtol=_NOISE)
    return units[:, None] * inverse * units
