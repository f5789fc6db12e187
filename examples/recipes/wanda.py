"""Wanda (arXiv:2306.11695): the half of each row's weights that matters least set to zero.

python examples/recipes/wanda.py MODEL TEXT OUT
"""

from __future__ import annotations

import sys

from torch import Tensor

from corda_kernels import calibrate, load_model, load_tokenizer, token_batches
from corda_kernels.integrations.statistics import wanda_norms
from corda_kernels.models import save_model

SPARSITY = 0.5


def pruned(weight: Tensor, norms: Tensor) -> Tensor:
    """Zeroes the smallest |W[i, j]|·‖X[:, j]‖ of each row i."""
    count = int(SPARSITY * weight.shape[1])
    least = (weight.abs() * norms).topk(count, dim=1, largest=False).indices
    return weight.scatter(1, least, 0)


source, text, out = sys.argv[1:]
model = load_model(source, dtype="float32")
batches = token_batches(text, load_tokenizer(source), samples=64, seq_len=128)
for name, norms in wanda_norms(calibrate(model, batches)).items():
    weight = model.get_submodule(name).weight.data
    weight.copy_(pruned(weight, norms))
save_model(model, out, source=source)
