"""CO-SVD: one end of the spectrum of W·C, for one layer or a batch of one shape.

For research there are norms on both sides of a weight, ‖D^½ (W − X) C^p‖_F, and the oblique
projections that they lead to. With P Pᵀ = D and G Gᵀ = C^2p the norm is that of Pᵀ (W − X) G, so
that by Eckart and Young the best X comes of the singular pairs of Pᵀ W G = Q Σ Vᵀ:
X = P⁻ᵀ Q_I Q_Iᵀ Pᵀ W. Neither Σ nor X depends on which square roots are taken, for another is P or
G times an orthogonal matrix; nor does U = P⁻ᵀ Q, for which Uᵀ D U = I, nor its dual D U = P Q. Thus
X = U_I (D U_I)ᵀ W, a projection that is oblique.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from corda_kernels import arguments
from corda_kernels.errors import ConvergenceWarning, DecompositionError, RankError, warn
from corda_kernels.linalg.exact import End, exact, lower_gram, lower_triangle, no_taller, null_share
from corda_kernels.linalg.krylov import STOP, block_size, bottom, top
from corda_kernels.linalg.operand import Operand, check_damping, check_entries, damped
from corda_kernels.precision import without_autocast

Method = Literal["auto", "exact", "randomized"]

# A dense SVD costs as much as iterating at this size, and at fewer than six blocks of vectors
# (measured on a CPU: 192 channels 5 ms, 576 channels 86 ms against 25 to 45 ms).
_DENSE_SIZE = 256
_DENSE_BLOCKS = 6
# Rows that are compared with the columns of a covariance, and by how much of their largest entry
# they may differ.
_PROBED = 8
_ASYMMETRY = 1e-3
# The diagonal of a Cholesky factor understates the condition by up to 400 (measured on covariances
# of SmolLM2-135M): below this many times d·eps a matrix may be singular to working precision.
_DOUBTFUL = 1e3


@dataclass(frozen=True, eq=False)
class CoSVD:
    """A part of the decomposition W·(C + λI)ᵖ = U Σ Vᵀ, in float64; p is 1 by default.

    Attributes:
        U: (*batch, out, rank), left singular vectors: orthonormal or, given an output covariance D,
            with Uᵀ D U = I.
        S: (*batch, rank), their singular values, descending.
        damping: (*batch), λ as a multiple of the mean diagonal of C.
        residual: (*batch), the estimated error at which the iteration stopped, or 0 with the exact
            method: the largest error of a wanted vector, as a sine, from Ritz residuals before the
            last application of M Mᵀ or, for the smallest, of its inverse, with M = W·C.
        dual: (*batch, out, rank), D U if an output covariance D was given, otherwise None, and U
            takes its place. The components' part of W is U dualᵀ W.

    """

    U: Tensor
    S: Tensor
    damping: Tensor
    residual: Tensor
    dual: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by the names of their fields."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def of(self, index: int) -> CoSVD:
        """One decomposition of a batch."""
        return CoSVD(**{name: tensor[index] for name, tensor in self.tensors().items()})


@torch.no_grad()
def co_svd(
    weight: Tensor,  # (*batch, out, in)
    covariance: Tensor,  # (*batch, in, in)
    *,
    rank: int,
    which: End = "largest",
    method: Method = "auto",
    damping: float | None = None,
    seed: int = 0,
    output_covariance: Tensor | None = None,  # (*batch, out, out)
    power: float = 1.0,
) -> CoSVD:
    """Decomposes W·C and keeps the `rank` largest or smallest singular pairs.

    The result is accurate as in float64: covariances of real models have condition numbers up to
    1e10, so the smallest vectors would be noise in float32. An iteration may begin in float32, but
    its result is measured and corrected in float64. The exact method orders directions in which C
    is zero (σ = 0) by W, as in the limit of a vanishing damping.

    For research, D^½·W·C^power can take the place of W·C. Let X = U dualᵀ W, which is U Uᵀ W
    without D. For the largest pairs X minimises ‖D^½ (W − X) C^power‖_F among all matrices of that
    rank; for the smallest it is what the best approximation by all other pairs leaves of W. With
    power 0.5 and no D, ‖(W − X) C^½‖² is the mean of ‖Wx − Xx‖² over the inputs; D weights the
    outputs.


    Args:
        weight: (*batch, out, in), any floating dtype.
        covariance: (*batch, in, in), symmetric positive semi-definite, any floating dtype, on any
            device.
        rank: number of pairs, 1 … min(out, in).
        which: "largest" (IPM trains these) or "smallest" (KPM).
        method: "exact" for a dense SVD; "randomized" for an iteration, which falls back on the
            exact method with a ConvergenceWarning if it does not converge; "auto" picks by size.
        damping: multiple of the mean diagonal of C that is added to C's diagonal, and likewise to
            D's; None for none.
        seed: random seed of the iteration's start.

        output_covariance: D (*batch, out, out), symmetric positive definite once damped; None for
            the identity.
        power: exponent of C, 1.0 or 0.5.

    Raises:
        ConfigError: an option has a value that is not allowed.
        RankError: the rank is not possible for this shape.
        DecompositionError: an input is no dense floating-point tensor, shapes do not fit, an input
            holds NaN or Inf or leaves the range of float64, D is singular, or C has negative
            eigenvalues at power 0.5.


    Source: CorDA (arXiv:2406.05223), equation 2; for D and power, the head of this file.
    """
    rank = check(weight, covariance, rank, which, method, damping)
    arguments.real_number("power", power, "0.5 or 1.0", lambda x: x in (0.5, 1.0))
    arguments.seed_number("seed", seed)
    C = damped(covariance.to(weight.device), damping)
    if power != 1.0:
        C = replace(C, matrix=input_root(C.double()), shift=None, symmetric=False)
    M, P = weight, None
    if output_covariance is not None:
        wanted = "an output covariance (*batch, out, out)"
        _check_side(weight, -2, output_covariance, "output covariance", wanted)
        check_entries("output covariance", output_covariance, "check the model's weights")
        D = damped(output_covariance.to(weight.device), damping).double()
        P = factored(D, f"an output covariance ({D.shape[-1]} outputs)")
        M = P.mT @ weight.double()
    found, given_up = decompose(M, C, rank, which, method, seed)
    warn_given_up(given_up)
    if P is None:
        return found
    U = torch.linalg.solve_triangular(P.mT, found.U, upper=True)
    return replace(found, U=U, dual=P @ found.U)


@without_autocast()
@torch.no_grad()
def singular_values(
    weight: Tensor, covariance: Tensor, *, damping: float | None = None, tail: bool = True
) -> Tensor:
    """The singular values of W·(C + λI), descending, in float64.

    Args:
        weight: (*batch, out, in), any floating dtype.
        covariance: (*batch, in, in), symmetric positive semi-definite, any floating dtype.
        damping: λ as a multiple of the mean diagonal of C; None for none.
        tail: whether the small ones matter, one by one. Without them the eigenvalues of the Gram
            matrix will do, at two thirds of the time: those below 1e-8 of the largest are then
            noise of that size, which a sum does not notice.

    Returns:
        (*batch, min(out, in)).

    Raises:
        ConfigError: the damping is out of range.
        DecompositionError: an input is no dense tensor of floating numbers, shapes do not fit, or
            an input holds NaN or Inf or leaves the range of float64.
    """
    check(weight, covariance, 1, "largest", "exact", damping)
    arguments.flag("tail", tail)
    C = damped(covariance.to(weight.device), damping).double()
    W = weight.double()
    values: Tensor
    if tail:
        values = torch.linalg.svdvals(lower_triangle(no_taller(W)[1] @ C))
        return values
    M = W @ C
    values = torch.linalg.eigvalsh(lower_gram(M if M.shape[-2] <= M.shape[-1] else M.mT))
    return values.flip(-1).clamp_min(0).sqrt()


def warn_given_up(error: Tensor, prefix: str = "") -> None:
    """Warns where the iteration gave up, at an error (*batch) that is 0 where it did not."""
    if bool((error != 0).any()):
        warn(
            f"{prefix}the randomised method did not converge (error {float(error.max()):.1e}): "
            "the exact one ran instead",
            ConvergenceWarning,
        )


def check(
    weight: Tensor, covariance: Tensor, rank: int, which: str, method: str, damping: float | None
) -> int:
    """Refuses what `co_svd` cannot decompose, see there, and returns the rank as an int.

    The devices may differ.
    """
    arguments.one_of("which", which, get_args(End))
    arguments.one_of("method", method, ("auto", "exact", "randomized"))
    check_damping(damping)
    check_shapes(weight, covariance)
    outputs, inputs = weight.shape[-2:]
    name, most = f"the rank for a weight of {outputs} × {inputs}", min(outputs, inputs)
    number = arguments.whole_number(name, rank, 1, most, error=RankError)
    if weight.device.type not in ("cpu", "cuda"):
        raise DecompositionError(
            f"a weight on {weight.device} has no float64 to be decomposed in: move it to the CPU"
        )
    # Some rows are compared with the columns. NaN is another matter.
    some = torch.linspace(0, inputs - 1, _PROBED, device=covariance.device).long()
    rows, columns = covariance[..., some, :].double(), covariance[..., some].mT.double()
    if rows.numel() and bool(((rows - columns).abs() > _ASYMMETRY * rows.abs().amax()).any()):
        raise DecompositionError(
            "the covariance is not symmetric: if only a triangle of it is filled, fill the other"
        )
    check_entries("weight", weight, "check the model's weights")
    remedy = "calibrate again, in a wider dtype if activations overflowed"
    check_entries("covariance", covariance, remedy)
    return number


def check_shapes(weight: Tensor, covariance: Tensor) -> None:
    """Refuses what is no weight (*batch, out, in) with a covariance (*batch, in, in).

    Raises:
        DecompositionError: one is no dense tensor of floating numbers, they do not go together, or
            the weight is empty.
    """
    arguments.real_tensor("the weight", weight, DecompositionError)
    _check_side(weight, -1, covariance, "covariance", "a covariance (*batch, in, in)")
    if 0 in weight.shape[-2:]:
        raise DecompositionError(f"a weight {tuple(weight.shape)} has nothing to decompose")


def _check_side(weight: Tensor, side: int, matrix: Tensor, name: str, wanted: str) -> None:
    """Refuses a matrix that is no covariance of one side of the weight."""
    arguments.real_tensor(f"the {name}", matrix, DecompositionError)
    if weight.ndim < 2 or matrix.shape != (*weight.shape[:-2], *2 * (weight.shape[side],)):
        raise DecompositionError(
            f"a weight {tuple(weight.shape)} needs {wanted}, got {tuple(matrix.shape)}"
        )


@without_autocast()
def decompose(
    W: Tensor, C: Operand, rank: int, which: End, method: Method, seed: int
) -> tuple[CoSVD, Tensor]:
    """One end of the singular value decomposition of W·C; see `co_svd`.

    By iteration or by the exact method, which also takes those of a batch where the former fails.

    Args:
        W: (*batch, out, in).
        C: (*batch, in, in), damped, or a root of that.
        rank: how many pairs.
        which: see `co_svd`.
        method: see `co_svd`.
        seed: of the random start of an iteration.

    Returns:
        The decomposition, and the error (*batch) at which the iteration gave up, 0 where it did
        not.
    """
    shortest = min(W.shape[-2:])
    dense = shortest <= _DENSE_SIZE or shortest < _DENSE_BLOCKS * block_size(rank, shortest)
    if method == "exact" or (method == "auto" and dense) or W.numel() == 0:
        U, S = exact(W.double(), C.double(), rank, which)
        error = given_up = torch.zeros_like(S[..., 0])
    else:
        iterate = {"largest": top, "smallest": bottom}[which]
        generator = torch.Generator(W.device).manual_seed(seed)
        U, S, error, largest = iterate(W, C, rank, generator)
        # Of null directions the order is a question to W, not to M.
        null = (largest == 0) | (S[..., -1] <= largest * null_share(W))
        lost = ~(error <= STOP[which].tolerance)  # NaN has not converged either
        given_up = torch.where(lost & ~null, error, 0.0)
        for index in map(tuple, torch.nonzero(null | lost).tolist()):
            U[index], S[index] = exact(W[index].double(), C.of(index).double(), rank, which)
            error[index] = 0
    return CoSVD(U, S, torch.full_like(error, C.damping), error), given_up


def factored(matrix: Tensor, name: str) -> Tensor:
    """The lower Cholesky factor of a positive definite matrix (*batch, d, d) in float64.

    Raises:
        DecompositionError: the matrix, for which `name` stands, is not that to working precision.
    """
    factor, ratio = _cholesky(matrix)
    if bool((ratio <= factor.shape[-1] * torch.finfo(factor.dtype).eps).any()):
        raise DecompositionError(
            f"{name} is singular or indefinite, from too few tokens or with dead channels: use a "
            "damping, such as 0.01"
        )
    return factor


def input_root(C: Tensor) -> Tensor:
    """A G with G Gᵀ = C, (*batch, in, in) float64, for positive semi-definite C.

    The Cholesky factor; of what is singular or nearly so, the eigenvectors times the roots of the
    eigenvalues, in which null directions are zero and not rounding of size √eps.

    Raises:
        DecompositionError: a C has an eigenvalue further below 0 than rounding explains.
    """
    G, ratio = _cholesky(C)
    size, eps = C.shape[-1], torch.finfo(C.dtype).eps
    for index in map(tuple, torch.nonzero(ratio <= _DOUBTFUL * size * eps).tolist()):
        eigenvalues, V = torch.linalg.eigh(C[index])
        largest = eigenvalues[-1].clamp(min=0)
        # Covariances are often summed in float32.
        if bool(eigenvalues[0] < -size * torch.finfo(torch.float32).eps * largest):
            least, most = float(eigenvalues[0]), float(eigenvalues[-1])
            raise DecompositionError(
                f"a covariance ({size} channels) has an eigenvalue of {least:.1e}, its largest is "
                f"{most:.1e}: not a covariance; check how it was made"
            )
        G[index] = V * torch.where(eigenvalues <= size * eps * largest, 0.0, eigenvalues).sqrt()
    return G


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors, and an upper bound (*batch) of λmin/λmax, 0 for what cannot be factored."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    ratio = (diagonal.amin(-1) / diagonal.amax(-1)).square()
    return factor, torch.where((info == 0) & torch.isfinite(ratio), ratio, 0.0)
