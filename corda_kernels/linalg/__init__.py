"""W and C → U and Σ. Pure tensors: knows no model and no calibration."""

from corda_kernels.linalg.context_svd import CoSVD, co_svd, singular_values
from corda_kernels.linalg.exact import End
from corda_kernels.linalg.gradient import steepest_rows
from corda_kernels.linalg.inverse import (
    RegularizedInverse,
    extreme_eigenvalues,
    regularized_inverse,
)
from corda_kernels.linalg.layers import co_svd_layers, is_small, map_layers, parallel_map

__all__ = [
    "CoSVD",
    "End",
    "RegularizedInverse",
    "co_svd",
    "co_svd_layers",
    "extreme_eigenvalues",
    "is_small",
    "map_layers",
    "parallel_map",
    "regularized_inverse",
    "singular_values",
    "steepest_rows",
]
