"""Were there enough samples? How well two halves of the calibration text agree, layer by layer.

An adapter should not depend on which documents happened to be sampled. Each half alone yields the
subspace that an adapter would be made of; what the other half thinks of it is measured in the terms
that matter at that end of the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from corda_kernels.calibration import CovarianceSet
from corda_kernels.decomposition import co_svd
from corda_kernels.models import linear_weight

# Bounds of the verdicts "stable" and "fair".
_TOP = (0.9, 0.75)
_BOTTOM = (1.1, 1.5)


@dataclass(frozen=True)
class LayerStability:
    """Agreement of the two halves in one layer.

    Attributes:
        top: overlap ‖U₁ᵀU₂‖²/rank of the subspaces of the largest components, from rank/out (no
            relation) to 1 (the same); None where it was not computed.
        bottom: energy that the smallest components of one half have in the other, over the least
            possible there: ‖U₁ᵀ M₂‖/‖U₂ᵀ M₂‖ and the converse, their geometric mean; 1 is the best;
            None where it was not computed.
    """

    top: float | None = None
    bottom: float | None = None


@dataclass(frozen=True)
class Stability:
    """Agreement of two halves of the calibration text.

    Attributes:
        rank: size of the subspaces compared.
        damping: of both covariances, times their mean diagonal.
        tokens: in each half.
        layers: by module name.
    """

    rank: int
    damping: float | None
    tokens: tuple[int, int]
    layers: dict[str, LayerStability]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stability:
        """Reads what `to_json` gave."""
        layers = {name: LayerStability(**entry) for name, entry in value["layers"].items()}
        first, second = value["tokens"]
        return cls(value["rank"], value["damping"], (first, second), layers)

    def verdict(self, layer: LayerStability) -> str:
        """One word for a layer: "stable", "fair" or "unstable"."""
        grades = []
        if layer.top is not None:
            grades.append(sum(layer.top < bound for bound in _TOP))
        if layer.bottom is not None:
            grades.append(sum(layer.bottom > bound for bound in _BOTTOM))
        return ("stable", "fair", "unstable")[max(grades)]

    def summary(self) -> str:
        """The verdict over all layers in plain words."""
        verdicts = [self.verdict(layer) for layer in self.layers.values()]
        total = len(verdicts)
        bad = verdicts.count("unstable")
        stable = verdicts.count("stable")
        counts = f"{stable} of {total} layers stable, {total - stable - bad} fair, {bad} unstable"
        if bad > total / 4:
            advice = "not enough samples: use at least four times as many"
        elif bad or stable < total / 2:
            advice = "barely enough samples: twice as many would be better"
        else:
            advice = "enough samples"
        return f"{advice} ({counts} between the two halves of the text)"


@torch.no_grad()
def subspace_stability(
    modules: Mapping[str, nn.Module],
    first: CovarianceSet,
    second: CovarianceSet,
    *,
    rank: int,
    damping: float | None = 0.01,
    top: bool = True,
    bottom: bool = True,
    progress: bool = False,
) -> Stability:
    """Compares the subspaces that two halves of a calibration text lead to.

    Args:
        modules: linear layers by name, each covered by both sets.
        first: covariances from one half.
        second: covariances from the other.
        rank: number of components; cut to what a layer allows.
        damping: times the mean diagonal of each covariance.
        top: whether to compare the largest components.
        bottom: whether to compare the smallest.
        progress: whether to show a progress bar.

    Raises:
        DecompositionError: a covariance does not fit its layer.
    """
    layers = {}
    for name in tqdm(modules, desc="stability", unit=" layers", disable=not progress, leave=False):
        weight = linear_weight(modules[name])
        both = [half[name].matrix.to(weight.device) for half in (first, second)]
        k = min(rank, *weight.shape)
        layers[name] = LayerStability(
            _top_overlap(weight, both, k, damping) if top else None,
            _bottom_excess(weight, both, k, damping) if bottom else None,
        )
    tokens = tuple(max(c.tokens for c in half.values()) for half in (first, second))
    return Stability(rank, damping, (tokens[0], tokens[1]), layers)


def _top_overlap(weight: Tensor, both: list[Tensor], rank: int, damping: float | None) -> float:
    """‖U₁ᵀU₂‖²/rank."""
    first, second = (
        co_svd(weight, matrix, rank=rank, which="largest", damping=damping).U for matrix in both
    )
    return float((first.mT @ second).square().sum()) / rank


def _bottom_excess(weight: Tensor, both: list[Tensor], rank: int, damping: float | None) -> float:
    """Geometric mean of ‖U₁ᵀM₂‖/‖U₂ᵀM₂‖ and ‖U₂ᵀM₁‖/‖U₁ᵀM₁‖."""
    parts = [
        co_svd(weight, matrix, rank=rank, which="smallest", damping=damping) for matrix in both
    ]
    ratio = 1.0
    for here, there in ((0, 1), (1, 0)):
        matrix = both[there].double()
        projected = parts[here].U.mT @ weight.double()
        image = projected @ matrix
        if damping:
            image = image + damping * matrix.diagonal().mean() * projected
        least = parts[there].S.norm().clamp_min(torch.finfo(torch.float64).tiny)
        ratio *= float(image.norm() / least)
    return math.sqrt(ratio)
