"""Statistics that other methods gather in passes of their own, from one CovarianceSet.

Each is given by layer name. Layers that read the same tensor share one result, as they share their
covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from corda_kernels.arguments import instance_of, real_number, shown, whole_number
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.errors import CovarianceError, DecompositionError, ModelError, RankError
from corda_kernels.linalg.operand import check_damping
from corda_kernels.linears import linear_weight
from corda_kernels.planning.selection import model_layer

T = TypeVar("T")

# SmoothQuant's own floor of a channel's magnitude, which keeps dead channels from a scale of 0.
_SMALLEST_MAGNITUDE = 1e-5


@dataclass(frozen=True, eq=False)
class InputComponents:
    """The principal directions of a layer's inputs X (tokens, in), not centred.

    Attributes:
        components: (rank, in) float64, orthonormal rows: the right singular vectors of X.
        singular_values: (rank,) float64, of X, descending.
        explained: (rank,) float64, each direction's share of ‖X‖².
    """

    components: Tensor
    singular_values: Tensor
    explained: Tensor


@torch.no_grad()
def gptq_hessians(covariances: CovarianceSet) -> dict[str, Tensor]:
    """H = 2/n Σ x xᵀ (in, in), the Hessian of ‖(W − Ŵ) X‖²/n with respect to a row of W.

    GPTQ divides by sequences instead of tokens; it uses H up to a factor only.

    Source: GPTQ (arXiv:2210.17323), section 3, equation 2; H = 2XXᵀ.
    """
    return _by_group(covariances, lambda covariance, _: 2 * covariance.matrix)


@torch.no_grad()
def svd_llm_whitening(
    covariances: CovarianceSet, *, damping: float | None = None
) -> dict[str, Tensor]:
    """S (in, in) float64, lower triangular, with S Sᵀ = Σ x xᵀ: the inputs S⁻¹X are white.

    Truncating the SVD of W S loses exactly the singular values cut off, in ‖(W − Ŵ) X‖.

    Args:
        covariances: covariances of the inputs.
        damping: share of each covariance's mean diagonal that is added to its diagonal; None for
            none.

    Raises:
        ConfigError: the damping has a value that is not allowed.
        DecompositionError: a covariance is singular; give a damping.


    Source: SVD-LLM (arXiv:2403.07378), section 3.1.
    """

    check_damping(damping)

    def whiten(covariance: Covariance, names: list[str]) -> Tensor:
        total = covariance.matrix.double() * covariance.tokens
        if damping:
            total.diagonal().add_(damping * total.diagonal().mean())
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(total)
        if int(info):
            raise DecompositionError(
                f"the covariance of layer {names[0]} is singular (minor {int(info)} of "
                f"{total.shape[0]}): calibrate on more tokens, or pass a damping, such as 0.01"
            )
        return factor

    return _by_group(covariances, whiten)


@torch.no_grad()
def wanda_norms(covariances: CovarianceSet) -> dict[str, Tensor]:
    """‖Xⱼ‖₂ (in,), each channel's norm over all tokens; Wanda prunes the smallest |Wᵢⱼ|·‖Xⱼ‖₂.

    Source: Wanda (arXiv:2306.11695), equation 1.
    """
    return _by_group(
        covariances,
        lambda covariance, _: (covariance.matrix.diagonal() * covariance.tokens).sqrt(),
    )


@torch.no_grad()
def smoothquant_scales(
    model: nn.Module, covariances: CovarianceSet, *, alpha: float = 0.5
) -> dict[str, Tensor]:
    """sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1 − α) (in,): X/s and W·s are both easy to quantise.

    Layers that read the same tensor get one scale, from the largest weight of all of them, because
    the layer before them can be divided only once.

    Args:
        model: model that the covariances belong to.
        covariances: covariances of the inputs.
        alpha: share of the difficulty that moves from X to W, 0 … 1.

    Raises:
        ConfigError: alpha is out of range.
        ModelError: `model` is no module.

        CovarianceError: the model lacks a layer, or has it in another size.

    Source: SmoothQuant (arXiv:2211.10438), equation 4.
    """
    real_number("alpha", alpha, "between 0 and 1", lambda x: 0 <= x <= 1)
    instance_of("the model", model, nn.Module, ModelError)

    def scale(covariance: Covariance, names: list[str]) -> Tensor:
        heights = [_column_maximum(model, name, covariance) for name in names]
        weight = torch.stack(heights).amax(0).clamp_min(_SMALLEST_MAGNITUDE)
        activation = covariance.absmax.to(weight).clamp_min(_SMALLEST_MAGNITUDE)
        return (activation**alpha / weight ** (1 - alpha)).clamp_min(_SMALLEST_MAGNITUDE)

    return _by_group(covariances, scale)


@torch.no_grad()
def eva_components(covariances: CovarianceSet, *, rank: int) -> dict[str, InputComponents]:
    """The `rank` leading right singular vectors of each layer's inputs, from which EVA makes A.

    They come from one eigendecomposition of C, which resolves singular values down to about 1e-4 of
    the largest: enough for the leading ones. PEFT's EVA subtracts the mean from its inputs first;
    here nothing is subtracted.

    Raises:
        RankError: the rank is no positive number, or exceeds a layer's number of inputs.

    Source: EVA (arXiv:2410.07170), section 3.2.
    """

    whole_number("rank", rank, 1, error=RankError)

    def decompose(covariance: Covariance, names: list[str]) -> InputComponents:
        channels = covariance.matrix.shape[0]
        if rank > channels:
            raise RankError(
                f"rank {shown(rank)} is not possible for layer {names[0]} of {channels} inputs"
            )
        values, vectors = torch.linalg.eigh(covariance.matrix.double())
        values = values.clamp_min(0).flip(0)
        return InputComponents(
            vectors.flip(1)[:, :rank].mT.contiguous(),
            (values[:rank] * covariance.tokens).sqrt(),
            values[:rank] / values.sum(),
        )

    return _by_group(covariances, decompose)


def _by_group(
    covariances: CovarianceSet, compute: Callable[[Covariance, list[str]], T]
) -> dict[str, T]:
    """One result for each distinct covariance and its layers, by the names of these."""
    instance_of("covariances", covariances, CovarianceSet, CovarianceError)
    if covariances.normalize != "tokens":
        raise CovarianceError(
            f'these covariances were taken with normalize="{covariances.normalize}", which divides '
            'each call by its own scale: calibrate with normalize="tokens"'
        )
    results: dict[str, T] = {}
    for covariance, names in covariances.groups():
        results.update(dict.fromkeys(names, compute(covariance, names)))
    return {name: results[name] for name in covariances}


def _column_maximum(model: nn.Module, name: str, covariance: Covariance) -> Tensor:
    """max|W| of each column, (in,) float32."""
    weight = linear_weight(model_layer(model, name))
    channels = len(covariance.matrix)
    if weight.shape[1] != channels:
        raise CovarianceError(
            f"layer {name} has {weight.shape[1]} inputs, but its covariance {channels} channels: "
            "give the model that was calibrated"
        )
    return weight.abs().amax(0).float()
