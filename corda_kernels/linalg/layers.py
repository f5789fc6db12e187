"""CO-SVD of a model's layers: side by side on a CPU, in batches on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from corda_kernels.arguments import instance_of, seed_number, whole_number
from corda_kernels.errors import DecompositionError, RankError
from corda_kernels.linalg.context_svd import (
    CoSVD,
    Method,
    check,
    decompose,
    warn_given_up,
)
from corda_kernels.linalg.exact import End
from corda_kernels.linalg.operand import Operand, damped
from corda_kernels.linalg.parallel import parallel_map, streamed_map
from corda_kernels.memory import free_bytes

# Up to this many rows or columns on the longer side, layers run side by side on a CPU, and in
# batches on a GPU; larger ones fill all cores by themselves, and take more memory.
_SMALL = 2048
# Float64 matrices of in × in, or out × in where that is more, that a layer takes on a GPU.
_MATRICES = 4
# Batches at work at a time on a GPU, at most. With 1, 4, 8 and 16 of them an H100 takes 62, 38, 41
# and 43 ms for the top 128 of a layer of LLaMA-2-7B, and 157, 67, 60 and 56 ms for the bottom.
_STREAMS = 4
_CPU = torch.device("cpu")

Entry = tuple[str, CoSVD, Tensor]  # name, what was found, the error at which an iteration gave up


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
    memory_limit: int | None = None,
) -> Iterator[tuple[str, CoSVD]]:
    """Decomposes the layers of a model; each result is what `co_svd` gives on the layer alone.

    On a CPU small layers run side by side, one thread each, those that share a covariance (the very
    same tensor) one after the other. On a GPU small layers of one shape and rank run in batches,
    and several batches, or large layers, at a time, each on a stream of its own.

    Args:
        weights: (out, in) by layer name, any floating dtype.
        covariances: (in, in) by layer name, on any device.
        rank: of every layer, or by layer name.
        which: see `co_svd`.
        method: see `co_svd`.
        damping: see `co_svd`.
        seed: of the random start, the same for every layer.
        memory_limit: bytes that all this may take on a GPU, about; None for half of what is free.

    Yields:
        The name and decomposition of every layer, on its weight's device, small layers first.

    Raises:
        ConfigError: see `co_svd`.
        RankError: see `co_svd`; the message begins with the layer's name, as in the next.
        DecompositionError: see `co_svd`; or a layer has no covariance.
    """
    instance_of("weights", weights, Mapping)
    instance_of("covariances", covariances, Mapping)
    seed_number("seed", seed)
    if memory_limit is not None:
        whole_number("memory_limit", memory_limit, 0)
    ranks = {name: _rank_of(name, rank) for name in weights}
    _check(weights, covariances, ranks, which, method, damping)

    def on_cpu(names: list[str]) -> list[Entry]:
        C, share = damped(covariances[names[0]].cpu(), damping)
        if which == "smallest" and len(names) > 1:  # converted once for all of them
            C = Operand(C.double(), symmetric=True)
        entries = []
        for name in names:
            W = weights[name]
            found = decompose(W, C, ranks[name], which, method, _generator(W, seed))
            part = CoSVD(found.U, found.S, share, found.residual)
            entries.append((name, part, found.given_up))
        return entries

    def in_batch(names: list[str]) -> list[Entry]:
        W = torch.stack([weights[name] for name in names])
        C, share = damped(torch.stack([covariances[name].to(W.device) for name in names]), damping)
        found = decompose(W, C, ranks[names[0]], which, method, _generator(W, seed))
        parts = zip(names, found.U, found.S, share, found.residual, found.given_up, strict=True)
        return [(name, CoSVD(*part[:4]), part[4]) for name, *part in parts]

    groups = _together(weights, covariances, ranks)
    small: list[list[str]] = []
    large: list[list[str]] = []
    for names in groups.pop(_CPU):
        (small if max(weights[names[0]].shape) <= _SMALL else large).append(names)
    running = [parallel_map(on_cpu, small), map(on_cpu, large)]
    for device, of_shapes in groups.items():
        limit = free_bytes(device) // 2 if memory_limit is None else memory_limit
        batches = _batches(of_shapes, weights, limit)
        if device.type == "cuda":
            need = max(len(names) * _bytes(weights[names[0]]) for names in batches)
            workers = max(1, min(_STREAMS, limit // max(need, 1)))
            running.append(streamed_map(in_batch, batches, device, workers))
        else:
            running.append(map(in_batch, batches))
    for name, found, given_up in chain.from_iterable(chain.from_iterable(running)):
        if found.U.is_cuda:
            for tensor in (found.U, found.S, found.damping, found.residual):
                # Memory of another stream, which must not be used again there too soon.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        warn_given_up(given_up, f"layer {name}: ")
        yield name, found


def _together(
    weights: Mapping[str, Tensor], covariances: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> dict[torch.device, list[list[str]]]:
    """Names of the layers that go together, by device: on a CPU those of one covariance, on a GPU
    those of one shape and rank."""
    # Held while they are told apart by identity, for a mapping may make them on access; no longer,
    # for it may also let go of them on the way.
    held = {name: covariances[name] for name in weights}
    groups: dict[torch.device, dict[object, list[str]]] = {_CPU: {}}
    for name, weight in weights.items():
        on_cpu = weight.device == _CPU
        key = id(held[name]) if on_cpu else (weight.shape, ranks[name])
        groups.setdefault(weight.device, {}).setdefault(key, []).append(name)
    return {device: list(of.values()) for device, of in groups.items()}


def _batches(
    of_shapes: list[list[str]], weights: Mapping[str, Tensor], limit: int
) -> list[list[str]]:
    """Small layers of one shape together, as many as a stream may take; large ones alone."""
    batches = []
    for names in of_shapes:
        weight = weights[names[0]]
        most = 1
        if max(weight.shape) <= _SMALL:
            most = max(1, limit // _STREAMS // max(_bytes(weight), 1))
        batches += [names[start : start + most] for start in range(0, len(names), most)]
    return batches


def _bytes(weight: Tensor) -> int:
    return 8 * _MATRICES * max(weight.shape) * weight.shape[1]


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
            C = covariances[name]
        except KeyError as error:
            raise DecompositionError(
                f"layer {name} has no covariance: give the covariances of all these layers"
            ) from error
        try:
            check(weight, C, ranks[name], which, method, damping)
        except (RankError, DecompositionError) as error:
            raise type(error)(f"layer {name}: {error}") from error


def _rank_of(name: str, rank: int | Mapping[str, int]) -> int:
    if not isinstance(rank, Mapping):
        return whole_number("rank", rank, error=RankError)
    if name not in rank:
        raise RankError(f"layer {name} is given no rank: name it, or give one rank for all layers")
    return whole_number(f"rank of layer {name}", rank[name], error=RankError)


def _generator(like: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)
