"""The cases of `corda-kernels bench covariance` under pytest-benchmark.

python -m pytest benches --benchmark-json=out.json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from corda_kernels.bench.covariance import addmm_baseline
from corda_kernels.kernels import syrk_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(8192, 576), (8192, 1536), (4096, 4096)]


@pytest.mark.parametrize(("tokens", "channels"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["addmm", "syrk_"])
def test_covariance(
    benchmark: Any, kernel: str, dtype: torch.dtype, tokens: int, channels: int
) -> None:
    x = torch.randn(tokens, channels, device=DEVICE).to(dtype)
    c = torch.zeros(channels, channels, device=DEVICE)
    absmax = torch.zeros(channels, device=DEVICE)
    count = torch.zeros(channels, dtype=torch.int64, device=DEVICE)

    def run() -> Tensor:
        if kernel == "addmm":
            addmm_baseline(c, x)
        else:
            syrk_(c, x, absmax=absmax, outlier_count=count)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return c

    benchmark.group = f"{tokens} x {channels} {dtype}"
    benchmark(run)
