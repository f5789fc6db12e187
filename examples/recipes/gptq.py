"""GPTQ (arXiv:2210.17323): weights rounded to 4 bits.

    python examples/recipes/gptq.py MODEL TEXT OUT

OUT is a model of the same size and dtype, whose weights are the rounded ones. An engine that packs
4 bits has to be given the same scales.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from corda_kernels import calibrate, load_model, load_tokenizer, token_batches
from corda_kernels.integrations.statistics import gptq_hessians
from corda_kernels.models import save_model

LARGEST = 7  # of the integers -7 … 7, which 4 bits hold


def on_grid(columns: Tensor, scale: Tensor) -> Tensor:
    """The nearest multiple of each row's scale (out, 1)."""
    return (columns / scale).round().clamp(-LARGEST, LARGEST) * scale


def gptq(weight: Tensor, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Rounds column by column. Each error is made up for by the columns that are not rounded yet.

    The inverse Hessian of the columns from j on has the row U[j, j]·U[j, j:] on top, where U is the
    upper Cholesky factor of the whole inverse.
    """
    W, H = weight.to(torch.float64, copy=True), hessian.double()
    scale = W.abs().amax(1, keepdim=True).clamp_min(1e-12) / LARGEST
    rounded = torch.empty_like(W)
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for j in range(len(U)):
        rounded[:, j : j + 1] = on_grid(W[:, j : j + 1], scale)
        W[:, j:] -= (W[:, j : j + 1] - rounded[:, j : j + 1]) / U[j, j] * U[j, j:]
    return rounded


source, text, out = sys.argv[1:]
model = load_model(source, dtype="float32")
batches = token_batches(text, load_tokenizer(source), samples=64, seq_len=128)
for name, hessian in gptq_hessians(calibrate(model, batches)).items():
    weight = model.get_submodule(name).weight.data
    weight.copy_(gptq(weight, hessian))
save_model(model, out, source=source)
