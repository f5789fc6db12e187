"""From a model and calibration text to an adapted model, in one call."""

from corda_kernels.init.adapter import check_targets, corda_adapter, init_corda
from corda_kernels.init.budget import adapter_parameters
from corda_kernels.init.candidates import calibrate_candidates
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.halves import calibrate_halves
from corda_kernels.init.stages import covariance_stages, united_provenance

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
