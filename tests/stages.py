"""Covariances of a whole model, as the pipeline makes them, in one call."""

from __future__ import annotations

from typing import Any

from torch import nn

from corda_kernels import CovarianceSet
from corda_kernels.init import CalibrationPlan, covariance_stages


def one_stage(model: nn.Module, batches: Any, **options: Any) -> CovarianceSet:
    plan = CalibrationPlan(**({"progress": False} | options))
    (found,) = covariance_stages(model, batches, plan)
    return found
