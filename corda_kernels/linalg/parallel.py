"""Independent decompositions side by side: one thread each on a CPU, one stream each on a GPU."""

from __future__ import annotations

import contextvars
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from corda_kernels.kernels import batched_svd

# Items taken ahead, for each worker on a CPU.
_AHEAD = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """`function` of each item, in their order, several at a time.

    LAPACK's factorisations of a few hundred rows use a second core badly: two at a time with one
    thread each are 1.6 to 2 times as fast as one after the other with two. A few items are taken
    ahead of the one whose result is due, so that a long one keeps nobody waiting. While it is
    iterated over, torch runs on one thread in the whole process; afterwards on as many as before.

    Args:
        function: releases the GIL most of the time, as torch's operations do.
        items: taken one by one, as workers become free.
        workers: how many at a time; None for as many as torch has threads.
    """
    threads = torch.get_num_threads()
    workers = threads if workers is None else workers
    if workers < 2:
        yield from map(function, items)
        return
    # A new thread has OpenMP's own number of threads until torch has been asked for its own there.
    # MKL's QR on several rounds otherwise, it seems: on a busy machine the R of a 160 × 64 matrix
    # was another in 4 of 192 runs, and with it files that should be the same; with this in none.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(1)
    try:
        with pool:
            yield from _in_order(pool, function, items, _AHEAD * workers)
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
    streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
    for index in range(workers):
        streams.put(_stream(device, index))
    # torch loads its CUDA linear algebra at the first use, which two threads must not do at once,
    # and so does `batched_svd` with its kernels.
    torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))
    batched_svd(torch.eye(2, device=device))

    def run(item: Item) -> Result:
        stream = streams.get()
        try:
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                result = function(item)
            stream.synchronize()
        finally:
            streams.put(stream)
        return result

    with ThreadPoolExecutor(workers) as pool:
        yield from _in_order(pool, run, items, workers)


@functools.cache
def _stream(device: torch.device, index: int) -> torch.cuda.Stream:
    """The same ones every time: torch keeps what memory each has used apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[Result]:
    """Results in the order of the items, of which some are taken ahead."""
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
        for future in running:
            future.cancel()
