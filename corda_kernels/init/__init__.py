"""From a model and calibration text to an adapted model, in one call."""

from corda_kernels.init.checks import check_targets
from corda_kernels.init.config import CalibrationPlan, CordaConfig
from corda_kernels.init.covariances import covariance_stages, united_provenance
from corda_kernels.init.run import corda_adapter, init_corda

__all__ = [
    "CalibrationPlan",
    "CordaConfig",
    "check_targets",
    "corda_adapter",
    "covariance_stages",
    "init_corda",
    "united_provenance",
]
