"""SVD-LLM (arXiv:2403.07378): weights truncated to a low rank where the inputs feel it least.

    python examples/recipes/svd_llm.py MODEL TEXT OUT

OUT holds the products B·A, so that anything loads it. Storing B and A instead takes 80 % of the
layers' memory.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from corda_kernels import calibrate, load_model, load_tokenizer, token_batches
from corda_kernels.integrations.statistics import svd_llm_whitening
from corda_kernels.models import save_model

KEPT = 0.8  # of the numbers in W (out, in): rank·(out + in) of them are in B and A


def truncated(weight: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in): the leading part of W·S, times S⁻¹."""
    rank = int(KEPT * weight.numel() / sum(weight.shape))
    U, sigma, Vh = torch.linalg.svd(weight.double() @ S, full_matrices=False)
    A = torch.linalg.solve_triangular(S, Vh[:rank], upper=False, left=False)
    return U[:, :rank] * sigma[:rank], A


source, text, out = sys.argv[1:]
model = load_model(source, dtype="float32")
batches = token_batches(text, load_tokenizer(source), samples=64, seq_len=128)
for name, S in svd_llm_whitening(calibrate(model, batches), damping=1e-6).items():
    weight = model.get_submodule(name).weight.data
    B, A = truncated(weight, S)
    weight.copy_(B @ A)
save_model(model, out, source=source)
