"""Were there enough samples? How well two halves of the calibration text agree, layer by layer.

An adapter should not depend on which documents happened to be sampled. Each half alone yields the
subspace that an adapter would be made of; what the other half thinks of it is measured in the terms
that matter at that end of the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.arguments import instance_of, one_of, whole_number
from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import ConfigError, CovarianceError
from corda_kernels.fields import Check, check_fields, is_number, is_object, is_whole
from corda_kernels.linalg import CoSVD, co_svd_layers
from corda_kernels.linalg.operand import check_damping
from corda_kernels.linears import LinearWeights, linear_shape
from corda_kernels.progress import progress_bar

End = Literal["largest", "smallest"]

_FIELDS: dict[str, Check] = {
    "rank": lambda value: is_whole(value, 1),
    "damping": lambda _: True,  # see check_damping
    "tokens": lambda value: (
        isinstance(value, list | tuple) and len(value) == 2 and all(map(is_whole, value))
    ),
    "layers": is_object,
}
_LAYER_FIELDS: dict[str, Check] = dict.fromkeys(
    ("top?", "bottom?"), lambda value: value is None or is_number(value)
)

# Bounds of the verdicts "stable" and "fair".
_TOP = (0.9, 0.75)
_BOTTOM = (0.75, 0.5)


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

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stability:
        """Reads what `to_json` gave.

        Raises:
            CovarianceError: it is something else.
        """
        try:
            check_fields(value, _FIELDS)
            check_damping(value["damping"])
            for name, entry in value["layers"].items():
                check_fields(entry, _LAYER_FIELDS, name)
                if entry.get("top") is None and entry.get("bottom") is None:
                    raise ValueError(f"{name} has neither 'top' nor 'bottom'")
        except ValueError as error:
            raise CovarianceError(
                f"the covariances' note on their stability cannot be read ({error}): calibrate "
                "again"
            ) from error
        layers = {name: LayerStability(**entry) for name, entry in value["layers"].items()}
        first, second = value["tokens"]
        return cls(value["rank"], value["damping"], (first, second), layers)

    def at(self, end: End, names: Iterable[str]) -> Stability | None:
        """What it says of some layers at one end alone; None if that was measured in none of them.

        Args:
            end: of the spectrum.
            names: of the layers; those that it knows nothing of are left out.

        Raises:
            ConfigError: there is no such end.
        """
        one_of("end", end, ("largest", "smallest"))
        known = {name: self.layers[name] for name in names if name in self.layers}
        layers = {
            name: replace(layer, bottom=None) if end == "largest" else replace(layer, top=None)
            for name, layer in known.items()
            if (layer.top if end == "largest" else layer.bottom) is not None
        }
        return replace(self, layers=layers) if layers else None

    def verdict(self, layer: LayerStability) -> str:
        """One word for a layer: "stable", "fair" or "unstable".

        Raises:
            ConfigError: the layer was measured at neither end.
        """
        instance_of("layer", layer, LayerStability)
        grades = []
        if layer.top is not None:
            grades.append(sum(layer.top < bound for bound in _TOP))
        if layer.bottom is not None:
            grades.append(sum(layer.bottom < bound for bound in _BOTTOM))
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
        ConfigError: neither end is asked for, or an option is not possible.
        CovarianceError: a half is no CovarianceSet, or does not cover a layer.
        DecompositionError: a covariance does not fit its layer.
    """
    rank = whole_number("rank", rank, 1)
    instance_of("modules", modules, Mapping)
    for half in (first, second):
        instance_of("each half", half, CovarianceSet, CovarianceError)
        missing = [name for name in modules if name not in half]
        if missing:
            raise CovarianceError(
                f"a half has no covariance of layer {missing[0]}: calibrate it with that target"
            )
    asked: tuple[tuple[End, bool], ...] = (("largest", top), ("smallest", bottom))
    ends = [end for end, wanted in asked if wanted]
    if not ends:
        raise ConfigError("there is nothing to compare: ask for the top, the bottom or both")
    weights = LinearWeights(modules)
    agreement: dict[End, dict[str, float]] = {end: {} for end in ends}
    bar = progress_bar(
        description="stability",
        unit="decompositions",
        shown=progress,
        total=2 * len(ends) * len(weights),
    )

    def decomposed(half: CovarianceSet, end: End) -> Iterator[tuple[str, CoSVD]]:
        ranks = {name: min(rank, *linear_shape(module)) for name, module in modules.items()}
        matrices = {name: half[name].matrix for name in weights}
        for part in co_svd_layers(weights, matrices, rank=ranks, which=end, damping=damping):
            bar.update()
            yield part

    with bar:
        for end in ends:
            of_first = dict(decomposed(first, end))
            for name, of_second in decomposed(second, end):
                pair = (of_first.pop(name), of_second)
                if end == "largest":
                    agreement[end][name] = _top_overlap(*pair)
                else:
                    weight = weights[name]
                    both = [half[name].matrix.to(weight.device) for half in (first, second)]
                    agreement[end][name] = _bottom_agreement(weight, both, pair, damping)
    top_of, bottom_of = (agreement.get(end, {}) for end, _ in asked)
    layers = {name: LayerStability(top_of.get(name), bottom_of.get(name)) for name in weights}
    tokens = [max((c.tokens for c in half.values()), default=0) for half in (first, second)]
    return Stability(rank, damping, (tokens[0], tokens[1]), layers)


def _top_overlap(first: CoSVD, second: CoSVD) -> float:
    """‖U₁ᵀU₂‖²/rank."""
    return float((first.U.mT @ second.U).square().sum()) / first.U.shape[1]


def _bottom_agreement(
    weight: Tensor, both: list[Tensor], parts: tuple[CoSVD, CoSVD], damping: float | None
) -> float:
    """Mean over both directions of 1 − log(e/e_best)/log(e_chance/e_best), cut to 0 … 1."""
    agreement = 0.0
    for here, there in ((0, 1), (1, 0)):
        matrix = both[there].double()
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
