"""What to decompose by, and whether the covariances support it."""

from corda_kernels.planning.stability import LayerStability, Stability, subspace_stability

__all__ = ["LayerStability", "Stability", "subspace_stability"]
