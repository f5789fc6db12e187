"""From a model and calibration text to an adapted model, in one call."""

from corda_kernels.pipeline.adapter import check_targets, corda_adapter, init_corda
from corda_kernels.pipeline.budget import adapter_parameters
from corda_kernels.pipeline.candidates import calibrate_candidates
from corda_kernels.pipeline.config import CordaConfig
from corda_kernels.pipeline.halves import calibrate_halves
from corda_kernels.pipeline.stages import covariance_stages, united_provenance

__all__ = [
    "CordaConfig",
    "adapter_parameters",
    "calibrate_candidates",
    "calibrate_halves",
    "check_targets",
    "corda_adapter",
    "covariance_stages",
    "init_corda",
    "united_provenance",
]
