"""W and C → U and Σ. Pure tensors: knows no model and no calibration."""

from corda_kernels.decomposition.cholesky import (
    RegularizedInverse,
    extreme_eigenvalues,
    regularized_inverse,
)
from corda_kernels.decomposition.co_svd import EXACT_SIZE, CoSVD, co_svd
from corda_kernels.decomposition.spectrum import singular_values

__all__ = [
    "EXACT_SIZE",
    "CoSVD",
    "RegularizedInverse",
    "co_svd",
    "extreme_eigenvalues",
    "regularized_inverse",
    "singular_values",
]
