"""What to decompose by, how much rank to give, and whether the covariances support it."""

from corda_kernels.planning.ranks import allocate_ranks, parse_budget, uniform_budget
from corda_kernels.planning.stability import LayerStability, Stability, subspace_stability

__all__ = [
    "LayerStability",
    "Stability",
    "allocate_ranks",
    "parse_budget",
    "subspace_stability",
    "uniform_budget",
]
