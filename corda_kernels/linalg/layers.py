"""CO-SVD of a model's layers: side by side on a CPU, in batches on a GPU."""

from __future__ import annotations

import contextvars
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from corda_kernels.arguments import instance_of, seed_number
from corda_kernels.errors import DecompositionError, RankError
from corda_kernels.kernels import batched_svd
from corda_kernels.linalg.context_svd import CoSVD, Method, check, decompose, warn_given_up
from corda_kernels.linalg.exact import End
from corda_kernels.linalg.operand import damped
from corda_kernels.memory import free_bytes

# Up to this many rows or columns on the longer side, layers run side by side on a CPU, and in
# batches on a GPU; larger ones fill all cores by themselves, and take more memory.
_SMALL = 2048
# Float64 matrices of in × in, or out × in where that is more, that a layer takes on a GPU.
_MATRICES = 4
# Batches at work at a time on a GPU, at most. With 1, 4, 8 and 16 of them an H100 takes 62, 38, 41
# and 43 ms for the top 128 of a layer of LLaMA-2-7B, and 157, 67, 60 and 56 ms for the bottom.
_STREAMS = 4
# Items taken ahead, for each worker on a CPU.
_AHEAD = 8
_CPU = torch.device("cpu")

Item = TypeVar("Item")
Result = TypeVar("Result")
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
) -> Iterator[tuple[str, CoSVD]]:
    """Decomposes the layers of a model; each result is what `co_svd` gives for the layer alone.

    On a CPU small layers run side by side, with one thread each; layers that share a covariance
    (the same tensor object) run one after another. On a GPU small layers of one shape and rank run
    in batches. Several batches, or large layers, run at once, each on its own stream.


    Args:
        weights: (out, in) by layer name, any floating dtype.
        covariances: (in, in) by layer name, on any device.
        rank: number of pairs, for all layers or by layer name.
        which: see `co_svd`.
        method: see `co_svd`.
        damping: see `co_svd`.
        seed: see `co_svd`; the same for every layer.

    Yields:
        The name and the decomposition of each layer, on its weight's device; small layers first.

    Raises:
        ConfigError: see `co_svd`.
        RankError: see `co_svd`; the message begins with the layer's name.
        DecompositionError: see `co_svd`, with the layer's name; or a layer has no covariance.

    """
    instance_of("weights", weights, Mapping)
    instance_of("covariances", covariances, Mapping)
    seed_number("seed", seed)
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(weights, rank)
    for name, weight in weights.items():
        if name not in ranks:
            raise RankError(f"layer {name} has no rank: give one, or one rank for all layers")
        try:
            ranks[name] = check(weight, covariances[name], ranks[name], which, method, damping)
        except KeyError as error:
            raise DecompositionError(f"layer {name} has no covariance: give one") from error
        except (RankError, DecompositionError) as error:
            raise type(error)(f"layer {name}: {error}") from error

    def on_cpu(names: list[str]) -> list[Entry]:
        C = damped(covariances[names[0]].cpu(), damping)
        if which == "smallest" and len(names) > 1:  # converted once for all of them
            C = replace(C, matrix=C.double(), shift=None)
        return [
            (name, *decompose(weights[name], C, ranks[name], which, method, seed)) for name in names
        ]

    def in_batch(names: list[str]) -> list[Entry]:
        W = torch.stack([weights[name] for name in names])
        C = damped(torch.stack([covariances[name].to(W.device) for name in names]), damping)
        found, error = decompose(W, C, ranks[names[0]], which, method, seed)
        return list(zip(names, map(found.of, range(len(names))), error, strict=True))

    groups = _together(weights, covariances, ranks)
    here = groups.pop(_CPU)
    running = [map_layers(on_cpu, here, [is_small(weights[names[0]]) for names in here])]
    for device, of_shapes in groups.items():
        limit = free_bytes(device) // 2
        batches = _batches(of_shapes, weights, limit)
        need = max(len(names) * _bytes(weights[names[0]]) for names in batches)
        workers = max(1, min(_STREAMS, limit // need))
        running.append(streamed_map(in_batch, batches, device, workers))
    for name, found, given_up in chain.from_iterable(chain.from_iterable(running)):
        if found.U.is_cuda:
            for tensor in found.tensors().values():
                # Memory of another stream, which must not be used again there too soon.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        warn_given_up(given_up, f"layer {name}: ")
        yield name, found


def map_layers(
    function: Callable[[Item], Result], items: Iterable[Item], small: Sequence[bool]
) -> Iterator[Result]:
    """`function` of every item: first of the small ones, side by side with one thread each.

    Args:
        function: see `parallel_map`.
        items: what to take.
        small: of each item whether it `is_small`.
    """
    parts: dict[bool, list[Item]] = {True: [], False: []}
    for item, side_by_side in zip(items, small, strict=True):
        parts[side_by_side].append(item)
    return chain(parallel_map(function, parts[True]), map(function, parts[False]))


def is_small(matrix: Tensor) -> bool:
    """Whether a CPU takes several such matrices at a time, since each uses its cores badly."""
    return matrix.is_cpu and max(matrix.shape) <= _SMALL


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
            most = max(1, limit // _STREAMS // _bytes(weight))
        batches += [names[start : start + most] for start in range(0, len(names), most)]
    return batches


def _bytes(weight: Tensor) -> int:
    return 8 * _MATRICES * max(weight.shape) * weight.shape[1]


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in their order, as many at a time as torch has threads.

    LAPACK's factorisations of a few hundred rows use a second core badly: two at a time with one
    thread each are 1.6 to 2 times as fast as one after the other with two. A few items are taken
    ahead of the one whose result is due, so that a long one keeps nobody waiting. While it is
    iterated over, torch runs on one thread in the whole process; afterwards on as many as before.

    Args:
        function: releases the GIL most of the time, as torch's operations do.
        items: taken one by one, as workers become free.
    """
    threads = torch.get_num_threads()
    if threads < 2:
        yield from map(function, items)
        return
    # A new thread has OpenMP's own number of threads until torch has been asked for its own there.
    # MKL's QR on several rounds otherwise, it seems: on a busy machine the R of a 160 × 64 matrix
    # was another in 4 of 192 runs, and with it files that should be the same; with this in none.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(1)
    try:
        yield from _in_order(pool, function, items, _AHEAD * threads)
    finally:
        torch.set_num_threads(threads)


def streamed_map(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device, workers: int
) -> Iterator[Result]:
    """The same on a GPU, each worker on a stream of its own.

    Eigenproblems and triangular solves of a single layer leave most of a GPU idle, and others fill
    it. What a call returns is complete: it can be used on any stream.
    """
    caller = torch.cuda.current_stream(device)
    streams = [_stream(device, index) for index in range(workers)]
    # torch loads its CUDA linear algebra at the first use, which two threads must not do at once,
    # and so does `batched_svd` with its kernels.
    torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))
    batched_svd(torch.eye(2, device=device))

    def run(item: Item) -> Result:
        stream = streams.pop()
        try:
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                result = function(item)
            stream.synchronize()
        finally:
            streams.append(stream)
        return result

    yield from _in_order(ThreadPoolExecutor(workers), run, items, workers)


@functools.cache
def _stream(device: torch.device, index: int) -> torch.cuda.Stream:
    """The same ones every time: torch keeps what memory each has used apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Results in the order of the items, of which some are taken ahead; the pool ends with them."""
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            # Each in the caller's context, by which a backend may have been chosen.
            context = contextvars.copy_context()
            running.append(pool.submit(context.run, torch.no_grad()(function), item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
