"""Model and tokens → covariances. Knows models, knows no decomposition."""

from corda_kernels.calibration.calibrate import calibrate
from corda_kernels.calibration.checkpoint import CalibrationCheckpoint
from corda_kernels.calibration.covariance import Covariance, CovarianceSet
from corda_kernels.calibration.streaming import calibrate_blocks

__all__ = [
    "CalibrationCheckpoint",
    "Covariance",
    "CovarianceSet",
    "calibrate",
    "calibrate_blocks",
]
