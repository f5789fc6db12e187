"""Were there enough samples? How well two halves of the calibration text agree, layer by layer.

An adapter should not depend on which documents happened to be sampled. Each half alone yields the
subspace that an adapter would be made of; what the other half thinks of it is measured in the terms
that matter at that end of the spectrum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.arguments import instance_of, one_of, whole_number
from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import ConfigError, CovarianceError
from corda_kernels.fields import Schema, check_fields, is_number, is_whole, list_of, maybe, whole
from corda_kernels.linalg import CoSVD, End, co_svd_layers
from corda_kernels.linalg.operand import check_damping
from corda_kernels.linears import LinearWeights, linear_shape
from corda_kernels.progress import progress_bar

# The attribute of `LayerStability` that has the agreement at an end.
AGREEMENT: dict[End, str] = {"largest": "top", "smallest": "bottom"}
_FIELDS: dict[str, Schema] = {
    "rank": whole(1),
    "damping": lambda _: True,  # see check_damping
    "tokens": lambda value: list_of(is_whole)(value) and len(value) == 2,
    "layers": {"*": {f"{name}?": maybe(is_number) for name in AGREEMENT.values()}},
}

# Bounds of the verdicts "stable" and "fair".
_BOUNDS = {"top": (0.9, 0.75), "bottom": (0.75, 0.5)}


@dataclass(frozen=True)
class LayerStability:
    """Agreement of the two halves in one layer.

    Attributes:
        top: overlap ‖U₁ᵀU₂‖²/rank of the subspaces of the largest components, from rank/out (no
            relation) to 1 (the same); None where it was not computed.
        bottom: how little the smallest components of one half do in the other, e = ‖U₁ᵀ M₂‖, from
            0 (as much as random directions) to 1 (as little as the other's own, ‖U₂ᵀ M₂‖), on a
            logarithmic scale; None where it was not computed. An overlap would say nothing here:
            in a flat tail any choice is as good as another.
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stability:
        """Reads what `asdict` gave.

        Raises:
            CovarianceError: it is something else.
        """
        try:
            check_fields(value, _FIELDS)
            check_damping(value["damping"])
            layers = {name: LayerStability(**entry) for name, entry in value["layers"].items()}
            if LayerStability() in layers.values():
                raise ValueError("a layer has neither 'top' nor 'bottom'")
        except ValueError as error:
            what = "the covariances' note on their stability cannot be read"
            raise CovarianceError(f"{what} ({error}): calibrate again") from error
        return cls(value["rank"], value["damping"], tuple(value["tokens"]), layers)

    def at(self, end: End, names: Iterable[str]) -> Stability | None:
        """What it says of some layers at one end alone; None if that was measured in none of them.

        Args:
            end: of the spectrum.
            names: of the layers; those that it knows nothing of are left out.

        Raises:
            ConfigError: there is no such end.
        """
        one_of("end", end, tuple(AGREEMENT))
        known = {name: getattr(self.layers.get(name), AGREEMENT[end], None) for name in names}
        layers = {
            name: LayerStability(**{AGREEMENT[end]: share})
            for name, share in known.items()
            if share is not None
        }
        return replace(self, layers=layers) if layers else None

    def verdict(self, layer: LayerStability) -> str:
        """One word for a layer: "stable", "fair" or "unstable".

        Raises:
            ConfigError: the layer was measured at neither end.
        """
        instance_of("layer", layer, LayerStability)
        known = {name: share for name, share in vars(layer).items() if share is not None}
        grades = [sum(x < bound for bound in _BOUNDS[name]) for name, x in known.items()]
        if not grades:
            raise ConfigError("the layer's stability was measured at neither end: measure one")
        return ("stable", "fair", "unstable")[max(grades)]

    def summary(self, rank: int | None = None) -> str:
        """The verdict over all layers in plain words.

        Args:
            rank: of the adapter that it is about; it says so if it was judged at another.
        """
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
        judged = "" if rank in (None, self.rank) else f", judged at rank {self.rank}"
        return f"{advice} ({counts} between the two halves of the text{judged})"


@torch.no_grad()
def subspace_stability(
    modules: Mapping[str, nn.Module],
    first: CovarianceSet,
    second: CovarianceSet,
    *,
    rank: int,
    damping: float | None = 0.01,
    ends: Sequence[str] = tuple(AGREEMENT),
    progress: bool = False,
) -> Stability:
    """Compares the subspaces that two halves of a calibration text lead to.

    Args:
        modules: linear layers by name, each covered by both sets.
        first: covariances from one half.
        second: covariances from the other.
        rank: number of components; cut to what a layer allows.
        damping: times the mean diagonal of each covariance.
        ends: of the spectrum to compare, "largest" and "smallest" components.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: neither end is asked for, or an option is not possible.
        CovarianceError: a half is no CovarianceSet, or does not cover a layer.
        DecompositionError: a covariance does not fit its layer.
    """
    rank = whole_number("rank", rank, 1)
    instance_of("modules", modules, Mapping)
    halves = (first, second)
    for half in halves:
        instance_of("each half", half, CovarianceSet, CovarianceError)
        if missing := [name for name in modules if name not in half]:
            raise CovarianceError(f"a half has no covariance of layer {missing[0]}: calibrate it")
    for each in ends:
        one_of("each end", each, tuple(AGREEMENT))
    if not ends:
        raise ConfigError("there is nothing to compare: ask for the largest or smallest components")
    weights = LinearWeights(modules)
    ranks = {name: min(rank, *linear_shape(module)) for name, module in modules.items()}
    decompositions = (
        (end, *decomposed)
        for end, half in itertools.product(AGREEMENT, halves)
        if end in ends
        for decomposed in co_svd_layers(
            weights,
            {name: half[name].matrix for name in weights},
            rank=ranks,
            which=end,
            damping=damping,
        )
    )
    found: dict[str, dict[str, float]] = {name: {} for name in weights}
    of_first: dict[str, CoSVD] = {}
    total = 2 * len(ends) * len(weights)
    bar: Any = {"description": "stability", "unit": "decompositions", "total": total}
    for end, name, part in progress_bar(decompositions, shown=progress, **bar):
        if name not in of_first:
            of_first[name] = part
        else:
            both = [half[name].matrix for half in halves]
            judged = _JUDGES[end](weights[name], both, (of_first.pop(name), part), damping)
            found[name][AGREEMENT[end]] = judged
    layers = {name: LayerStability(**shares) for name, shares in found.items()}
    tokens = [max((c.tokens for c in half.values()), default=0) for half in halves]
    return Stability(rank, damping, (tokens[0], tokens[1]), layers)


def _top_agreement(
    weight: Tensor, both: list[Tensor], parts: tuple[CoSVD, CoSVD], damping: float | None
) -> float:
    """Overlap ‖U₁ᵀU₂‖²/rank."""
    first, second = parts
    return float((first.U.mT @ second.U).square().sum()) / second.U.shape[1]


def _bottom_agreement(
    weight: Tensor, both: list[Tensor], parts: tuple[CoSVD, CoSVD], damping: float | None
) -> float:
    """Mean over both directions of 1 − log(e/e_best)/log(e_chance/e_best), cut to 0 … 1."""
    agreement = 0.0
    for here, there in ((0, 1), (1, 0)):
        matrix = both[there].to(weight.device).double()
        shift = (damping or 0.0) * matrix.diagonal().mean()
        W = weight.double()
        full = torch.linalg.matrix_norm(W @ matrix + shift * W)
        projected = parts[here].U.mT @ W
        found = torch.linalg.matrix_norm(projected @ matrix + shift * projected)
        # Below rounding nothing can be told apart, and of nothing there is no logarithm.
        floor = (max(W.shape) * torch.finfo(W.dtype).eps * full).clamp_min(1e-300)
        best = parts[there].S.norm().clamp_min(floor)
        chance = full * math.sqrt(parts[here].S.numel() / min(W.shape))
        if chance > best * (1 + 1e-6):
            share = float((found.clamp_min(best) / best).log() / (chance / best).log())
            agreement += (1 - min(share, 1.0)) / 2
        else:  # a flat spectrum: every subspace is as good
            agreement += 0.5
    return agreement


_JUDGES: dict[End, Callable[[Tensor, list[Tensor], tuple[CoSVD, CoSVD], float | None], float]] = {
    "largest": _top_agreement,
    "smallest": _bottom_agreement,
}
