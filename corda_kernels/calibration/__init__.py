"""Model and tokens → covariances. Knows models, knows no decomposition."""

from corda_kernels.calibration.calibrate import calibrate
from corda_kernels.calibration.covariance import Covariance, CovarianceSet

__all__ = ["Covariance", "CovarianceSet", "calibrate"]
