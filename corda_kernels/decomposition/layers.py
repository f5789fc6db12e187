"""CO-SVD of a model's layers: side by side on a CPU, in batches on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from corda_kernels.decomposition.co_svd import (
    CoSVD,
    Method,
    check,
    decompose,
    warn_given_up,
)
from corda_kernels.decomposition.damping import damped
from corda_kernels.decomposition.exact import End
from corda_kernels.decomposition.operand import Operand
from corda_kernels.decomposition.parallel import parallel_map
from corda_kernels.errors import DecompositionError, RankError

# Up to this many rows or columns on the longer side, layers run side by side on a CPU; larger ones
# fill all cores by themselves, and take more memory.
_SIDE_BY_SIDE = 2048
# Float64 matrices of a layer's size that a batch holds at a time: W and C, their product, its
# triangular factor, and what factoring takes.
_MATRICES = 6


@torch.no_grad()
def co_svd_layers(
    weights: Mapping[str, Tensor],  # (out, in) each
    covariances: Mapping[str, Tensor],  # (in, in) each
    *,
    rank: int | Mapping[str, int],
    which: End = "largest",
    method: Method = "auto",
    damping: float | None = None,
    seed: int = 0,
    memory_limit: int = 4 << 30,
) -> Iterator[tuple[str, CoSVD]]:
    """Decomposes the layers of a model; each result is what `co_svd` gives on the layer alone.

    On a CPU small layers run side by side, one thread each, those that share a covariance (the very
    same tensor) one after the other. On a GPU layers of one shape and rank run in batches.

    Args:
        weights: (out, in) by layer name, any floating dtype.
        covariances: (in, in) by layer name, on any device.
        rank: of every layer, or by layer name.
        which: see `co_svd`.
        method: see `co_svd`.
        damping: see `co_svd`.
        seed: of the random start, the same for every layer.
        memory_limit: bytes that a batch on a GPU may take, about.

    Yields:
        The name and decomposition of every layer, on its weight's device, small layers first.

    Raises:
        ConfigError: see `co_svd`.
        RankError: see `co_svd`; the message begins with the layer's name, as in the next.
        DecompositionError: see `co_svd`.
    """
    ranks = {name: rank[name] if isinstance(rank, Mapping) else int(rank) for name in weights}
    _check(weights, covariances, ranks, which, method, damping)

    def run(names: list[str]) -> list[tuple[str, CoSVD, Tensor]]:
        first = weights[names[0]]
        if first.device.type != "cpu":
            W = torch.stack([weights[name] for name in names])
            C, share = damped(
                torch.stack([covariances[name].to(first.device) for name in names]), damping
            )
            found = decompose(W, C, ranks[names[0]], which, method, _generator(W, seed))
            parts = zip(names, found.U, found.S, share, found.residual, found.given_up, strict=True)
            return [(name, CoSVD(*part[:4]), part[4]) for name, *part in parts]
        C, share = damped(covariances[names[0]].cpu(), damping)
        if which == "smallest" and len(names) > 1:  # converted once for all of them
            C = Operand(C.double(), symmetric=True)
        results = []
        for name in names:
            W = weights[name]
            found = decompose(W, C, ranks[name], which, method, _generator(W, seed))
            part = CoSVD(found.U, found.S, share, found.residual)
            results.append((name, part, found.given_up))
        return results

    small: list[list[str]] = []
    large: list[list[str]] = []
    for names in _together(weights, covariances, ranks, memory_limit):
        weight = weights[names[0]]
        aside = weight.device.type == "cpu" and max(weight.shape) <= _SIDE_BY_SIDE
        (small if aside else large).append(names)
    for part in chain(parallel_map(run, small), map(run, large)):
        for name, found, given_up in part:
            warn_given_up(given_up, f"layer {name}: ")
            yield name, found


def _together(
    weights: Mapping[str, Tensor],
    covariances: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    memory_limit: int,
) -> list[list[str]]:
    """Names of the layers that go together: with one covariance, or in one batch."""
    # Held while they are told apart by identity, for a mapping may make them on access; no longer,
    # for it may also let go of them on the way.
    held = {name: covariances[name] for name in weights}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, weight in weights.items():
        if weight.device.type == "cpu":
            key: tuple[object, ...] = (id(held[name]),)
        else:
            key = (weight.device, weight.shape, ranks[name])
        groups.setdefault(key, []).append(name)
    together = []
    for names in groups.values():
        weight = weights[names[0]]
        most = len(names)
        if weight.device.type != "cpu":
            layer = 8 * _MATRICES * max(weight.shape) * weight.shape[1]
            most = max(1, memory_limit // layer)
        together += [names[start : start + most] for start in range(0, len(names), most)]
    return together


def _check(
    weights: Mapping[str, Tensor],
    covariances: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    which: End,
    method: Method,
    damping: float | None,
) -> None:
    for name, weight in weights.items():
        try:
            check(weight, covariances[name], ranks[name], which, method, damping)
        except (RankError, DecompositionError) as error:
            raise type(error)(f"layer {name}: {error}") from error


def _generator(like: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)
