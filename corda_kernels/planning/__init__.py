"""What to decompose by, how much rank to give, and whether the covariances support it."""

from corda_kernels.planning.mixing import drift_weights, mix_covariances
from corda_kernels.planning.ranks import allocate_ranks, parse_budget, uniform_budget
from corda_kernels.planning.scores import LayerSpectrum, compactness, layer_spectra
from corda_kernels.planning.selection import Selection, select_covariance
from corda_kernels.planning.stability import LayerStability, Stability, subspace_stability

__all__ = [
    "LayerSpectrum",
    "LayerStability",
    "Selection",
    "Stability",
    "allocate_ranks",
    "compactness",
    "drift_weights",
    "layer_spectra",
    "mix_covariances",
    "parse_budget",
    "select_covariance",
    "subspace_stability",
    "uniform_budget",
]
