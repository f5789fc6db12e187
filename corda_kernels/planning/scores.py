"""How compact a layer is under a covariance: CorDA++'s score, and the two parts that it is made of.

Selection scores every candidate by it, rank allocation reads the same two parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.arguments import instance_of, one_of, real_tensor, whole_number
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.covariance import Group
from corda_kernels.calibration.distributed import Ranks, covariances_given, layers_given
from corda_kernels.errors import ConfigError, CovarianceError, DecompositionError
from corda_kernels.linalg import extreme_eigenvalues, is_small, map_layers, singular_values
from corda_kernels.linalg.context_svd import check_shapes
from corda_kernels.linalg.operand import check_damping, near_one
from corda_kernels.linears import linear_weight, weights_at_hand
from corda_kernels.progress import progress_bar

Condition = Literal["ratio", "bound", "tight"]

CONDITIONS = ("ratio", "bound", "tight")

# Of scores where none is asked for: real covariances are singular to working precision.
SCORING_DAMPING = 0.01


@torch.no_grad()
def compactness(
    weight: Tensor,  # (*batch, out, in)
    covariance: Tensor,  # (*batch, in, in)
    *,
    damping: float = 1e-2,
    condition: Condition = "ratio",
) -> Tensor:
    """The score by which CorDA++ selects covariances, the lower the better.

        s = log π(C) · Σᵢ σᵢ(WC)/σmax(WC)

    with C damped. The sum, nuclear over spectral norm, is an effective rank between 1 and
    min(out, in). Real covariances are singular to working precision, so candidates can be compared
    only with the same damping. Scaling W or C changes nothing.

    Args:
        weight: (*batch, out, in), any floating dtype.
        covariance: (*batch, in, in), symmetric positive semi-definite, any floating dtype.
        damping: share of C's mean diagonal that is added to its diagonal.
        condition: definition of π, with λ the eigenvalues of the damped C divided by their mean:
            "ratio" for √out·λmax/λmin, the definition of CorDA++; "bound" for √out·√λmax/λmin, the
            result of its derivation; "tight" for √out/√λmin, a tighter bound.

    Returns:
        (*batch) float64; 0 where WC = 0.

    Raises:
        ConfigError: damping or condition has a value that is not allowed.
        DecompositionError: an input is no dense floating-point tensor, shapes do not fit, an input
            holds NaN or Inf, or C is singular although damped.


    Source: CorDA++, dynamic covariance selection.
    """
    check_condition(damping, condition)
    check_shapes(weight, covariance)
    W, C = near_one(weight), near_one(covariance.to(weight.device))
    rank = _effective_rank(singular_values(W, C, damping=damping, tail=False))
    return rank * log_condition(C, weight.shape[-2], damping=damping, condition=condition)


@torch.no_grad()
def log_condition(
    covariance: Tensor,  # (*batch, in, in)
    outputs: int,
    *,
    damping: float = 1e-2,
    condition: Condition = "ratio",
) -> Tensor:
    """log π(C) of a layer, at least 0.

    With λ the eigenvalues of C + damping·mean(diag C)·I, divided by their mean, π is

    - "ratio": √out·λmax/λmin, the definition of CorDA++;
    - "bound": √out·√λmax/λmin, what its derivation arrives at;
    - "tight": √out/√λmin, which bounds the same quantity and is about 100 times smaller.

    Args:
        covariance: (*batch, in, in), any floating dtype.
        outputs: of the layer.
        damping: added to C, times its mean diagonal.
        condition: which π.

    Returns:
        (*batch) float64. λmax and λmin come from all eigenvalues up to 2048 channels, beyond from
        Lanczos steps (`extreme_eigenvalues`).

    Raises:
        ConfigError: damping, condition or outputs is not possible.
        DecompositionError: C is no dense tensor of floating numbers, zero, not square, or not
            positive definite although damped.
    """
    check_condition(damping, condition)
    whole_number("outputs", outputs, 1)
    real_tensor("the covariance", covariance, DecompositionError)
    shape = tuple(covariance.shape)
    if len(shape) < 2 or shape[-2] != shape[-1] or not covariance.numel():
        raise DecompositionError(f"a covariance must be (*batch, in, in), got {shape}")
    damped = near_one(covariance)
    mean = damped.diagonal(dim1=-2, dim2=-1).mean(-1)
    if bool((mean == 0).any()):
        raise DecompositionError(
            "all its inputs are zero on this text: leave it out of the targets, or use other text"
        )
    damped.diagonal(dim1=-2, dim2=-1).add_(damping * mean[..., None])
    largest, smallest = extreme_eigenvalues(damped)
    mean = mean * (1 + damping)
    spread = {
        "ratio": lambda: (largest / smallest).log(),
        "bound": lambda: (largest / mean).log() / 2 - (smallest / mean).log(),
        "tight": lambda: -(smallest / mean).log() / 2,
    }[condition]()
    return math.log(outputs) / 2 + spread


def _effective_rank(spectrum: Tensor) -> Tensor:
    """Nuclear over spectral norm, Σσ/σmax (*batch), of singular values (*batch, R), descending."""
    largest = spectrum[..., 0]
    return torch.where(largest > 0, spectrum.sum(-1) / largest, 0.0)


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """What CorDA++ looks at in one layer.

    Attributes:
        singular_values: (R,) float64 on the CPU, of W·C damped, descending.
        log_condition: log π(C).
    """

    singular_values: Tensor
    log_condition: float

    @property
    def compactness(self) -> float:
        """The layer's score; see `compactness`."""
        return self.log_condition * float(_effective_rank(self.singular_values))


def layer_spectra(
    modules: Mapping[str, nn.Module],
    covariances: CovarianceSet,
    *,
    damping: float = 1e-2,
    condition: Condition = "ratio",
    tail: bool = True,
    distributed: bool = False,
    progress: bool = False,
) -> dict[str, LayerSpectrum]:
    """Spectrum and log condition of every layer; of a shared covariance the condition once.

    Args:
        modules: linear layers by name, in reach of `covariances`.
        covariances: their inputs' covariances.
        damping: see `compactness`.
        condition: see `log_condition`.
        tail: whether the smallest singular values must be right; scores do not need them.
        distributed: whether the ranks of torch.distributed, which must all be given the same, share
            the work; all get the same result.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: damping or condition is not possible; or `distributed` without a process group.
        CovarianceError: what is given is no CovarianceSet.
        DecompositionError: a covariance does not fit its layer, is not finite, or singular although
            damped; the message names the layer.
        DistributedError: another rank has ended, or was given something else.
    """
    check_condition(damping, condition)
    instance_of("covariances", covariances, CovarianceSet, CovarianceError)
    ranks = Ranks.of(distributed)
    options = {"damping": damping, "condition": condition, "tail": tail}
    ranks.agree(
        "layer_spectra",
        lambda: layers_given(modules, modules) | covariances_given(covariances) | options,
    )
    share = ranks.share_layers(modules)

    def scored(group: Group) -> dict[str, LayerSpectrum]:
        """The layers that read one input."""
        spectra: dict[str, LayerSpectrum] = {}
        for name in group[1]:
            with weights_at_hand(share[name]):
                weight = linear_weight(share[name]).detach()
                C = group[0].matrix.to(weight.device)
                try:
                    values = singular_values(weight, C, damping=damping, tail=tail)
                    if not spectra:
                        first = float(log_condition(C, 1, damping=damping, condition=condition))
                except DecompositionError as error:
                    raise DecompositionError(f"layer {name}: {error}") from error
            spectra[name] = LayerSpectrum(values.cpu(), first + math.log(weight.shape[0]) / 2)
        return spectra

    members = ((part, [n for n in names if n in share]) for part, names in covariances.groups())
    groups = [group for group in members if group[1]]
    small = [
        is_small(part.matrix) and bool(share[names[0]].weight.is_cpu) for part, names in groups
    ]
    bar: Any = {"description": "scoring", "unit": "inputs", "total": len(groups)}
    shown = progress and ranks.rank == 0
    found: dict[str, LayerSpectrum] = {}
    for part in progress_bar(map_layers(scored, groups, small), shown=shown, **bar):
        found |= part
    gathered = ranks.gather(found, "spectra")
    return {name: next(part[name] for part in gathered if name in part) for name in modules}


def check_condition(damping: float, condition: str) -> None:
    """Refuses options by which covariances cannot be scored.

    Raises:
        ConfigError: the damping is none; or there is no such condition.
    """
    if damping is None:
        raise ConfigError("scores need a damping, got None: give 0 for none")
    check_damping(damping)
    one_of("condition", condition, CONDITIONS)
