"""C += XᵀX with outlier statistics against torch's in-place product without them.

The error is relative, in the Frobenius norm. `corda-kernels bench covariance` has more cases.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, Contest, Sized
from torch import Tensor

from corda_kernels.bench.covariance import addmm_baseline
from corda_kernels.kernels import symmetrize_, syrk_

CASES = [(8192, 576), (8192, 1536), (4096, 4096)]


@pytest.mark.parametrize(("tokens", "channels"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["addmm", "syrk_"])
def test_covariance(
    contest: Contest[Tensor],
    sized: Sized,
    kernel: str,
    dtype: torch.dtype,
    tokens: int,
    channels: int,
) -> None:
    tokens, channels = sized(tokens), sized(channels)
    x = torch.randn(tokens, channels, device=DEVICE).to(dtype)
    c = torch.zeros(channels, channels, device=DEVICE)
    absmax = torch.zeros(channels, device=DEVICE)
    count = torch.zeros(channels, dtype=torch.int64, device=DEVICE)

    def run() -> Tensor:
        c.zero_()
        if kernel == "addmm":
            addmm_baseline(c, x)
        else:
            syrk_(c, x, absmax=absmax, outlier_count=count)
        return c

    def error(found: Tensor) -> float:
        exact = x.double().T @ x.double()
        return float((symmetrize_(found).double() - exact).norm() / exact.norm())

    contest(f"covariance {tokens} × {channels} {dtype}", run, error)
