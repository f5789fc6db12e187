"""What fixtures give: types for the tests that take them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from corda_kernels.calibration import CovarianceSet

Make = Callable[..., nn.Module]
Calibrated = Callable[..., tuple[nn.Module, CovarianceSet]]
Logits = Callable[[nn.Module], Tensor]
