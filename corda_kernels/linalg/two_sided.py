"""Norms on both sides of a weight: ‖D^½ (W − X) C^p‖_F, and the oblique projections it leads to.

With P Pᵀ = D and G Gᵀ = C^2p the norm is that of Pᵀ (W − X) G, so that by Eckart and Young the best
X comes of the singular pairs of Pᵀ W G = Q Σ Vᵀ: X = P⁻ᵀ Q_I Q_Iᵀ Pᵀ W. Neither Σ nor X depends on
which square roots are taken, for another is P or G times an orthogonal matrix; nor does U = P⁻ᵀ Q,
for which Uᵀ D U = I, nor its dual D U = P Q. Thus X = U_I (D U_I)ᵀ W, a projection that is oblique.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corda_kernels.arguments import real_number, real_tensor
from corda_kernels.errors import DecompositionError
from corda_kernels.linalg.operand import check_entries

# The diagonal of a Cholesky factor understates the condition by up to 400 (measured on covariances
# of SmolLM2-135M): below this many times d·eps a matrix may be singular to working precision.
_DOUBTFUL = 1e3


def check_two_sided(weight: Tensor, output_covariance: Tensor | None, power: float) -> None:
    """Refuses what `co_svd` cannot decompose; see there."""
    real_number("power", power, "0.5 or 1.0", lambda x: x in (0.5, 1.0))
    if output_covariance is None:
        return
    real_tensor("the output covariance", output_covariance, DecompositionError)
    outputs = weight.shape[-2]
    if output_covariance.shape != (*weight.shape[:-2], outputs, outputs):
        raise DecompositionError(
            f"a weight {tuple(weight.shape)} needs an output covariance (*batch, out, out), "
            f"got {tuple(output_covariance.shape)}"
        )
    check_entries("output covariance", output_covariance, "check the model's weights")


def output_root(D: Tensor) -> Tensor:
    """The lower triangular P with P Pᵀ = D, (*batch, out, out) float64.

    Raises:
        DecompositionError: a D is not positive definite to working precision, so that X would be
            free in directions that D does not see.
    """
    P, ratio = _cholesky(D)
    sound = ratio > D.shape[-1] * torch.finfo(D.dtype).eps
    if not bool(sound.all()):
        raise DecompositionError(
            f"an output covariance ({D.shape[-1]} outputs) is singular or indefinite, from too few "
            "tokens or with dead outputs: use a damping, such as 0.01"
        )
    return P


def input_root(C: Tensor) -> Tensor:
    """A G with G Gᵀ = C, (*batch, in, in) float64, for positive semi-definite C.

    The Cholesky factor; of what is singular or nearly so, the eigenvectors times the roots of the
    eigenvalues, in which null directions are zero and not rounding of size √eps.

    Raises:
        DecompositionError: a C has an eigenvalue further below 0 than rounding explains.
    """
    G, ratio = _cholesky(C)
    regular = ratio > _DOUBTFUL * C.shape[-1] * torch.finfo(C.dtype).eps
    for index in map(tuple, torch.nonzero(~regular).tolist()):
        G[index] = _eigen_root(C[index])
    return G


def oblique(Q: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """U = P⁻ᵀ Q and its dual D U = P Q, both (*batch, out, rank), of singular vectors Q."""
    U: Tensor = torch.linalg.solve_triangular(P.mT, Q, upper=True)
    return U, P @ Q


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors, and an upper bound (*batch) of λmin/λmax, 0 for what cannot be factored."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    ratio = (diagonal.amin(-1) / diagonal.amax(-1)).square()
    return factor, torch.where((info == 0) & torch.isfinite(ratio), ratio, 0.0)


def _eigen_root(C: Tensor) -> Tensor:
    """V Λ^½ of one C, (in, in), without what is zero to working precision."""
    eigenvalues, V = torch.linalg.eigh(C)
    largest = eigenvalues[-1].clamp(min=0)
    size = C.shape[-1]
    # Covariances are often summed in float32.
    if bool(eigenvalues[0] < -size * torch.finfo(torch.float32).eps * largest):
        raise DecompositionError(
            f"a covariance ({size} channels) has an eigenvalue of {float(eigenvalues[0]):.1e}, its "
            f"largest is {float(eigenvalues[-1]):.1e}: not a covariance; check how it was made"
        )
    null = eigenvalues <= size * torch.finfo(C.dtype).eps * largest
    root: Tensor = V * torch.where(null, 0.0, eigenvalues).sqrt()
    return root
