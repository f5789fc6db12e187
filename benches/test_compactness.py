"""The score by which CorDA++ selects covariances, against full SVDs of C and of W·C.

The error is relative to the score by full SVDs in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import DEVICE, Contest, Sized
from svd_cases import DAMPING, realistic_covariance
from torch import Tensor

from corda_kernels.planning import compactness

# (out, in) of a layer.
CASES = [(576, 576), (1536, 576), (576, 1536)]


def by_svd(W: Tensor, C: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is written down, in one dtype."""
    W, C = W.to(dtype), C.to(dtype, copy=True)
    C.diagonal().add_(DAMPING * C.diagonal().mean())
    spread = torch.linalg.svdvals(C)
    values = torch.linalg.svdvals(W @ C)
    log_condition = math.log(W.shape[0]) / 2 + (spread[0] / spread[-1]).log()
    return log_condition * values.sum() / values[0]


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "svdvals float32": partial(by_svd, dtype=torch.float32),
    "svdvals float64": partial(by_svd, dtype=torch.float64),
    "ours": partial(compactness, damping=DAMPING),
}


@pytest.mark.parametrize(("outputs", "inputs"), CASES)
@pytest.mark.parametrize("name", SCORES)
def test_compactness(
    contest: Contest[Tensor], sized: Sized, name: str, outputs: int, inputs: int
) -> None:
    outputs, inputs = sized(outputs), sized(inputs)
    generator = torch.Generator(DEVICE).manual_seed(0)
    C = realistic_covariance(inputs, generator)
    W = torch.randn(outputs, inputs, device=DEVICE, generator=generator) / math.sqrt(inputs)
    exact = float(by_svd(W, C, torch.float64))
    contest(
        f"compactness {outputs} × {inputs}",
        lambda: SCORES[name](W, C),
        lambda found: abs(float(found) / exact - 1),
    )
