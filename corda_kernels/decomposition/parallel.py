"""Small independent decompositions side by side on a CPU, one thread each."""

from __future__ import annotations

import contextlib
import contextvars
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

# Items taken ahead, for each worker.
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
    with _single_threaded(), ThreadPoolExecutor(workers) as pool:
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                # Each in the caller's context, by which a backend may have been chosen.
                context = contextvars.copy_context()
                running.append(pool.submit(context.run, torch.no_grad()(function), item))
                if len(running) > _AHEAD * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
