"""Covariances of a whole model, as the pipeline makes them, in one call."""

from __future__ import annotations

from typing import Any

from torch import nn

from corda_kernels import CovarianceSet
from corda_kernels.init import CalibrationPlan, covariance_stages


def one_stage(
    model: nn.Module,
    batches: Any,
    *,
    rank: int | None = None,
    checkpoint: Any = None,
    **options: Any,
) -> CovarianceSet:
    """With a rank the stability is judged at it."""
    judged = {} if rank is None else {"rank": rank, "stability": True}
    plan = CalibrationPlan(**({"progress": False} | judged | options))
    (found,) = covariance_stages(model, batches, plan, checkpoint=checkpoint)
    return found
