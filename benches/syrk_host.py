"""What one `syrk_` call costs the host, in microseconds.

    python benches/syrk_host.py                      # backend sm90 anywhere: the driver is stubbed
    python benches/syrk_host.py --device cuda        # every backend of a GPU, as it is

A call goes through the checks and the dispatch, finds what its launch needs, and launches. With the
driver stubbed a launch is a call into a C library that does nothing. The first call of a shape is
shown apart: it makes tensor maps, shares out the work, and on a GPU compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from corda_kernels import kernels
from corda_kernels.bench.timing import environment
from corda_kernels.files import write_json
from corda_kernels.kernels import available_backends, syrk_, syrk_sm90, use_backend

ROUNDS, CALLS = 30, 200


@contextlib.contextmanager
def stubbed_driver() -> Iterator[None]:
    """A GPU of compute capability 9.0 whose driver does nothing, with tensors on the CPU."""
    libc = ctypes.CDLL(None)
    driver = types.SimpleNamespace(
        cuTensorMapEncodeTiled=lambda *_: 0,
        cuLaunchKernel=lambda _, *rest: libc.abs(0, *rest),  # which ignores the rest
    )
    function = types.SimpleNamespace(ptr=1)
    stream = types.SimpleNamespace(cuda_stream=0)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (syrk_sm90, "_driver", lambda: driver),
            (syrk_sm90, "_functions", lambda device: defaultdict(lambda: function)),
            (syrk_sm90, "_multiprocessors", lambda device: 132),
            (torch.cuda, "current_stream", lambda device: stream),
            (torch.cuda, "device", contextlib.nullcontext),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(kernels._WHY_NOT, {"sm90": lambda: None}))
        yield


def microseconds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The first call, and the median and the best of rounds of later ones."""
    # The thread's own time where nothing is waited for: others may be at work on the same cores.
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    started = clock()
    call()
    first = clock() - started
    rounds = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = clock()
        for _ in range(CALLS):
            call()
        rounds.append((clock() - started) / CALLS)
    named = {"first": first, "median": statistics.median(rounds), "best": min(rounds)}
    return {name: 1e6 * seconds for name, seconds in named.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, help="a file for all results")
    given = parser.parse_args()
    device = torch.device(given.device)
    x = torch.randn(given.tokens, given.width, device=device).bfloat16()
    c = torch.zeros(given.width, given.width, device=device)
    absmax = torch.zeros(given.width, device=device)
    count = torch.zeros(given.width, dtype=torch.int64, device=device)
    results = {"environment": environment(device), "rows": []}
    print(", ".join(f"{key} {value}" for key, value in results["environment"].items()))
    on_gpu = device.type == "cuda"
    with contextlib.nullcontext() if on_gpu else stubbed_driver():
        reasons = available_backends("syrk_")
        here = [name for name in ("triton", "sm90") if reasons[name] is None]
        for backend in here if on_gpu else ("sm90",):
            with use_backend(backend):
                found = microseconds(
                    lambda: syrk_(c, x, absmax=absmax, outlier_count=count), device
                )
            results["rows"].append({"backend": backend, "stubbed": not on_gpu} | found)
            print(
                f"{backend}{'' if on_gpu else ', driver stubbed'}: {found['median']:.1f} µs, "
                f"best {found['best']:.1f}; the first {found['first']:.0f}",
                flush=True,
            )
    if given.json is not None:
        write_json(given.json, results)


if __name__ == "__main__":
    main()
