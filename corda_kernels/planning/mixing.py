"""Context mixtures: one covariance for several domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from corda_kernels.arguments import instance_of, one_of, real_number, shown
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.errors import ConfigError, CovarianceError
from corda_kernels.planning.selection import check_alike
from corda_kernels.versions import library_versions

Weights = Sequence[float] | Mapping[str, Sequence[float]]

_NOT_NOTED = ("stability", "versions")  # long, or said already


@torch.no_grad()
def mix_covariances(
    sets: Sequence[CovarianceSet],
    weights: Weights,
    *,
    normalize: Literal["trace", "tokens"] = "trace",
) -> CovarianceSet:
    """A convex mixture of the covariances of several domains, C = Σ wᵢ Cᵢ, layer by layer.

    W·C is linear in C, so that energies, its squares, react to the square of a domain's weight:
    inputs three times as large would count nine times. Traces are therefore made equal first.

    Args:
        sets: one for each domain, of the same layers.
        weights: one for each domain; or those of each layer by name (layers that read one input
            must agree); each at least 0, not all of them. They are divided by their sum.
        normalize: "trace" scales all to the trace of the weighted mean first, layer by layer;
            "tokens" takes them as they are, means over each domain's tokens.

    Returns:
        The mixture. Its tokens, calls and outlier counts are sums. Layers that share an input in
        all sets share it still. Names, weights and normalisation stand in `provenance["mixture"]`.

    Raises:
        ConfigError: the weights do not fit the sets, or an option is not possible.
        CovarianceError: the sets are none, cover different layers, or are normalised differently.

    Source: context mixtures of CorDA++; the trace normalisation is an addition.
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


def _check_sets(sets: Sequence[CovarianceSet]) -> None:
    instance_of("sets", sets, Sequence, CovarianceError)
    if not sets:
        raise CovarianceError("there are no covariances to mix: give at least one set")
    for index, part in enumerate(sets):
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
