"""All singular values of W·C."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.decomposition.co_svd import _check, _product, _triangle


@torch.no_grad()
def singular_values(
    weight: Tensor,  # (*batch, out, in)
    covariance: Tensor,  # (*batch, in, in)
    *,
    damping: float | None = None,
    tail: bool = True,
) -> Tensor:
    """All singular values of W·(C + λI), descending, (*batch, min(out, in)) float64.

    By default those of the triangular factor of W·C, which does not square its condition: the
    smallest are as good as float64 allows. Where they do not matter, as in a norm of all, the
    eigenvalues of the smaller Gram matrix take about half of the time.

    Args:
        weight: (*batch, out, in), any floating dtype.
        covariance: (*batch, in, in), symmetric positive semi-definite, any floating dtype.
        damping: λ as a multiple of the mean diagonal of C; None for none.
        tail: whether values below 1e-7 of the largest must be right.

    Raises:
        ConfigError: damping is out of range.
        DecompositionError: shapes do not fit, or an input holds NaN or Inf.
    """
    _check(weight, covariance, 1, "largest", "exact", damping)
    W = weight.double()
    if not tail:
        M, _ = _product(W, covariance.double(), damping)
        gram = M @ M.mT if M.shape[-2] <= M.shape[-1] else M.mT @ M
        squares: Tensor = torch.linalg.eigvalsh(gram)
        return squares.clamp_min(0).sqrt().flip(-1)
    if W.shape[-2] > W.shape[-1]:
        W = torch.linalg.qr(W, mode="r").R
    M, _ = _product(W, covariance.double(), damping)
    values: Tensor = torch.linalg.svdvals(_triangle(M))
    return values
