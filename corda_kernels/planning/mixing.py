"""Context mixtures: one covariance for several domains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from corda_kernels.arguments import instance_of, one_of, real_number, shown, whole_number
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.errors import ConfigError, CovarianceError, ModelError
from corda_kernels.linalg import co_svd
from corda_kernels.linears import linear_weight
from corda_kernels.planning.selection import check_alike, model_layer
from corda_kernels.progress import progress_bar
from corda_kernels.versions import library_versions

Weights = Sequence[float] | Mapping[str, Sequence[float]]

_MOST_STEPS = 10_000
_NOT_NOTED = ("stability", "versions")  # long, or said already


@torch.no_grad()
def mix_covariances(
    sets: Sequence[CovarianceSet],
    weights: Weights,
    *,
    normalize: Literal["trace", "tokens"] = "trace",
) -> CovarianceSet:
    """A convex mixture of the covariances of several domains, C = Σ wᵢ Cᵢ, layer by layer.

    Covariances are first scaled to equal traces, because inputs three times as large make a
    covariance nine times as large.

    Args:
        sets: covariances of each domain, for the same layers.
        weights: weight of each domain, or a mapping from layer names to such weights (equal for
            layers that read one input). Each is at least 0 and one is positive; they are divided by
            their sum. `corda_kernels.planning.drift_weights` chooses them.
        normalize: "trace" first scales all to the trace of the weighted mean, layer by layer;
            "tokens" takes them as they are, means over each domain's tokens.

    Returns:
        The mixture. Its tokens, calls and outlier counts are sums. Layers that share an input in
        all sets still share it. `provenance["mixture"]` has names, weights and normalisation.

    Raises:
        ConfigError: the weights do not fit the sets, or an option has a value that is not allowed.
        CovarianceError: there are no sets, they cover different layers, or they are normalised
            differently.


    Source: context mixtures of CorDA++; the trace normalisation and drift are additions.
    """
    one_of("normalize", normalize, ("trace", "tokens"))
    _check_sets(sets)
    shares = _shares(weights, sets)
    mixed: dict[str, Covariance] = {}
    for names in _shared_by_all(sets):
        if any(shares[name] != shares[names[0]] for name in names):
            raise ConfigError(f"{names[0]} and {names[-1]} read one input: weigh both the same")
        covariance = _mixture(sets, names[0], shares[names[0]], normalize)
        mixed.update(dict.fromkeys(names, covariance))
    sources = [
        {note: value for note, value in part.provenance.items() if note not in _NOT_NOTED}
        for part in sets
    ]
    each = shares if isinstance(weights, Mapping) else next(iter(shares.values()))
    return CovarianceSet(
        {name: mixed[name] for name in sets[0]},
        normalize=sets[0].normalize,
        left_out={name: reason for part in sets for name, reason in part.left_out.items()},
        provenance={
            "model": sources[0].get("model", ""),
            "tokens": sum(source.get("tokens", 0) for source in sources),
            "versions": library_versions(),
            "mixture": {"normalize": normalize, "weights": each, "sources": sources},
        },
    )


@torch.no_grad()
def drift_weights(
    model: nn.Module,
    sets: Sequence[CovarianceSet],
    held_out: Sequence[CovarianceSet],
    *,
    normalize: Literal["trace", "tokens"] = "trace",
    rank: int = 32,
    damping: float | None = 0.01,
    steps: int = 4,
    progress: bool = True,
) -> dict[str, tuple[float, ...]]:
    """Mixture weights with which no domain's outputs depend much on what KPM would train.

    With U the r smallest left singular vectors of W·C, and C the mixture, training may change all
    of UUᵀW. Its share of the energy of a domain's outputs, on text that was not calibrated on, is

        drift_d = ‖UᵀW C_d^½‖² / ‖W C_d^½‖² = tr(UᵀW C_d WᵀU) / tr(W C_d Wᵀ)

    summed over the layers that read one input. For each input we choose, among all weights that are
    multiples of 1/steps, those with the least maximum of drift_d/best_d, where best_d is the drift
    of domain d if it is calibrated on alone.

    Args:
        model: model that the covariances belong to.
        sets: covariances of each domain, for the same layers.
        held_out: covariances of other samples of the same domains, in the same order.
        normalize: see `mix_covariances`.
        rank: r, reduced to what a layer allows.
        damping: share of the mixture's mean diagonal that is added to its diagonal.
        steps: number of steps from weight 0 to 1; for two domains each layer is decomposed
            `steps` + 1 times.
        progress: whether to show a progress bar.

    Returns:
        The weights of each layer by name.

    Raises:
        ConfigError: an option has a value that is not allowed.
        ModelError: `model` is no module.
        CovarianceError: the sets do not go together, or the model lacks one of their layers.

    """
    one_of("normalize", normalize, ("trace", "tokens"))
    whole_number("rank", rank, 1)
    whole_number("steps", steps, 1, _MOST_STEPS)
    instance_of("model", model, nn.Module, ModelError)
    _check_sets(sets, held_out)
    if len(held_out) != len(sets):
        raise ConfigError(f"{len(sets)} domains need as many held-out sets, got {len(held_out)}")
    grid = [
        tuple(count / steps for count in counts)
        for counts in itertools.product(range(steps + 1), repeat=len(sets))
        if sum(counts) == steps
    ]
    alone = [grid.index(tuple(row)) for row in torch.eye(len(sets)).tolist()]
    chosen: dict[str, tuple[float, ...]] = {}
    groups = _shared_by_all([*sets, *held_out])
    for names in progress_bar(groups, description="drift", unit="inputs", shown=progress):
        layers = [linear_weight(model_layer(model, name)).detach() for name in names]
        outside = [part[names[0]].matrix for part in held_out]
        mixtures = (_mixture(sets, names[0], shares, normalize).matrix for shares in grid)
        drifts = torch.stack([_drift(layers, C, outside, rank, damping) for C in mixtures])
        worst = (drifts / drifts[alone].diagonal()).amax(1)
        chosen.update(dict.fromkeys(names, grid[int(worst.argmin())]))
    return {name: chosen[name] for name in sets[0]}


def _drift(
    layers: list[Tensor], mixture: Tensor, outside: list[Tensor], rank: int, damping: float | None
) -> Tensor:
    """Drift of each domain's held-out outputs, (domains), summed over layers of one input."""
    moved = torch.zeros(len(outside), dtype=torch.float64)
    whole = torch.zeros_like(moved)
    for weight in layers:
        k, C = min(rank, *weight.shape), mixture.to(weight.device)
        part = co_svd(weight, C, rank=k, which="smallest", damping=damping)
        W = weight.double()
        trained = part.U.mT @ W
        for domain, matrix in enumerate(outside):
            C = matrix.to(W)
            moved[domain] += float(((trained @ C) * trained).sum())
            whole[domain] += float(((W @ C) * W).sum())
    # Below this it is rounding, of which there is no ratio.
    return (moved / whole.clamp_min(1e-300)).clamp_min(1e-14)


def _check_sets(sets: Sequence[CovarianceSet], held_out: Sequence[CovarianceSet] = ()) -> None:
    instance_of("sets", sets, Sequence, CovarianceError)
    instance_of("held_out", held_out, Sequence, CovarianceError)
    if not sets:
        raise CovarianceError("there are no covariances to mix: give at least one set")
    for index, part in enumerate([*sets, *held_out]):
        instance_of("each set", part, CovarianceSet, CovarianceError)
        check_alike(f"sets 0 and {index}", part, sets[0].normalize, sets[0])


def _shared_by_all(sets: Sequence[CovarianceSet]) -> list[list[str]]:
    """Names of the layers that read one input in every set."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in sets[0]:
        groups.setdefault(tuple(id(part[name]) for part in sets), []).append(name)
    return list(groups.values())


def _shares(weights: Weights, sets: Sequence[CovarianceSet]) -> dict[str, tuple[float, ...]]:
    """Weights of each layer, their sum 1."""
    by_layer = weights if isinstance(weights, Mapping) else dict.fromkeys(sets[0], weights)
    if odd := sorted(by_layer.keys() ^ sets[0].keys()):
        raise ConfigError(f"weights by layer must be of the sets' layers: {odd[0]} is in one only")
    count = len(sets)
    rule = f"{count} sets need {count} weights of at least 0, not all of them 0, and below 1e100"
    shares = {}
    for name in sets[0]:
        given, what = by_layer[name], f"weights of layer {name}"
        each: list[float] = []
        if isinstance(given, Sequence) and len(given) == count:
            # Sums of such are finite.
            each = [
                real_number(what, x, f"numbers: {rule}", lambda x: 0 <= x < 1e100) for x in given
            ]
        if not any(each):
            raise ConfigError(f"{what}: {rule}, got {shown(given)}")
        shares[name] = tuple(weight / math.fsum(each) for weight in each)
    return shares


def _mixture(
    sets: Sequence[CovarianceSet], name: str, shares: Sequence[float], normalize: str
) -> Covariance:
    parts = [part[name] for part in sets]
    thresholds = {part.outlier_threshold for part in parts}
    widths = {part.matrix.shape[0] for part in parts}
    if len(thresholds) > 1 or len(widths) > 1:
        raise CovarianceError(
            f"layer {name}: {sorted(widths)} channels and outlier thresholds {sorted(thresholds)} "
            "do not mix: calibrate all with the same model and options"
        )
    scales = list(shares)
    if normalize == "trace":
        traces = [float(part.matrix.diagonal().double().sum()) for part in parts]
        mean = math.fsum(share * trace for share, trace in zip(shares, traces, strict=True))
        scales = [s * mean / trace if trace else s for s, trace in zip(shares, traces, strict=True)]
    # A part of weight 0 leaves no trace, not even of an Inf.
    used = [part for part, scale in zip(parts, scales, strict=True) if scale]
    matrix = torch.zeros_like(parts[0].matrix)
    for part, scale in zip(used, filter(None, scales), strict=True):
        matrix.add_(part.matrix.to(matrix), alpha=scale)
    tokens, calls = sum(part.tokens for part in used), sum(part.calls for part in used)
    absmax = torch.stack([part.absmax.to(matrix.device) for part in used]).amax(0)
    counts = torch.stack([part.outlier_count.to(matrix.device) for part in used]).sum(0)
    return Covariance(matrix, tokens, calls, absmax, counts, parts[0].outlier_threshold)
