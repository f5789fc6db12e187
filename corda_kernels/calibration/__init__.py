"""Model and tokens → covariances. Knows models, knows no decomposition."""

from corda_kernels.calibration.blocks import calibrate_blocks
from corda_kernels.calibration.covariance import Covariance, Gradient
from corda_kernels.calibration.covariance_set import CovarianceSet
from corda_kernels.calibration.journal import CalibrationCheckpoint
from corda_kernels.calibration.passes import calibrate

__all__ = [
    "CalibrationCheckpoint",
    "Covariance",
    "CovarianceSet",
    "Gradient",
    "calibrate",
    "calibrate_blocks",
]
