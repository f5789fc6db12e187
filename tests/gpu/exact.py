"""What kernels on a GPU are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(x: Tensor) -> Tensor:
    """xᵀx in float64, by chunks."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device="cuda")
    for chunk in torch.split(x, 8192):
        rows = chunk.double()
        total.addmm_(rows.T, rows)
    return total
