"""Which covariance kernel a GPU should prefer: all against torch.addmm and each other.

    python benches/syrk_experiment.py --json OUT                                        # on a GPU
    python benches/syrk_experiment.py --device cpu --widths 64 --tokens 256 --kernels cpu

First each kernel is checked in a process of its own, because a new one may hang. Only those
that are right are timed: single calls issued ahead of a busy device, calls back to back, which show
what the power limit leaves, and growing numbers of tokens, whose slope is the main loop and whose
intercept is the cost of adding a tile to C. Every line is printed and written at once, so that a
run that is stopped leaves what it has.

A kernel is a backend, or "triton" with its wide tile turned, or with programs that take nothing but
the statistics. "sm90" becomes the first choice on compute capability 9.0 if it is right and at
least 5 % faster than any of Triton's at 4096 and 8192 channels, with statistics.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda_kernels.bench.covariance import addmm_baseline
from corda_kernels.bench.timing import environment, measure
from corda_kernels.files import write_json
from corda_kernels.kernels import available_backends, syrk_, use_backend
from corda_kernels.kernels.reference import channel_statistics_
from corda_kernels.outputs import check_output

WIDTHS = "4096,8192,2048,576,1536,14336,11008"  # the decisive ones first
SHAPES = ((512, 512), (1000, 768), (777, 1000), (16424, 2048))
CHECK_SECONDS = 75  # of one backend, with its compilation
ALLOWED = 5e-5  # relative error of C, see bench covariance
THRESHOLD = 3.0

TRITON = {  # whether the tile is turned, and the runs of tokens of the programs that only read
    "triton turned": (True, 0),
    "triton readers": (False, 2),
    "triton turned readers": (True, 2),
}

Run = Callable[[Tensor], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", default=WIDTHS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", default=",".join(["triton", "sm90", *TRITON]))
    parser.add_argument("--seconds", type=float, default=300, help="time after which no row begins")
    parser.add_argument("--json", type=Path, help="a file for all results")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # one kernel, in this process
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.check is not None:
        return check(given.check, device)
    if given.json is not None:
        check_output(given.json)
    experiment = Experiment(device, given.tokens, given.json, time.monotonic() + given.seconds)
    kernels = [name for name in given.kernels.split(",") if experiment.is_right(name)]
    for width in map(int, given.widths.split(",")):
        experiment.times(width, kernels)
    for width in (4096, 1024) if device.type == "cuda" else ():
        experiment.tokens_against_time(width, kernels)
    return int(not kernels)


def add(
    kernel: str, c: Tensor, x: Tensor, absmax: Tensor | None, count: Tensor | None, **options: Any
) -> None:
    """c += xᵀx, with statistics, by one of the kernels."""
    if kernel not in TRITON:
        with use_backend(kernel):
            syrk_(c, x, absmax=absmax, outlier_count=count, **options)
        return
    from corda_kernels.kernels import triton_syrk

    turned, runs = TRITON[kernel]
    wide = x.shape[1] >= triton_syrk._WIDE_CHANNELS
    tile = triton_syrk.TMA_TURNED if turned and wide else None
    values = {"outlier_threshold": 6.0, "precision": "default", "deterministic": False} | options
    triton_syrk.syrk_(c, x, 1.0, absmax, count, **values, tile=tile, runs=runs)


def check(kernel: str, device: torch.device) -> int:
    """Prints the errors of one kernel; 0 if all are small enough."""
    wrong = 0
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, width in SHAPES if device.type == "cuda" else SHAPES[:1]:
            x = inputs(tokens, width, device, dtype)[0]
            expected = statistics(width, device)
            channel_statistics_(x, expected[0], expected[1], THRESHOLD)
            exact = x.double().T @ x.double()
            for deterministic in (False, True):
                sums = []
                for _ in range(2):
                    c, absmax, count = zeros(width, device), *statistics(width, device)
                    options = {"outlier_threshold": THRESHOLD, "deterministic": deterministic}
                    add(kernel, c, x, absmax, count, **options)
                    sums.append(c.tril())
                error = float((sums[0].double() - exact.tril()).norm() / exact.tril().norm())
                right = error <= ALLOWED and (not deterministic or torch.equal(*sums))
                right &= torch.equal(absmax, expected[0]) and torch.equal(count, expected[1])
                wrong += not right
                print(
                    f"{kernel}: {tokens} × {width} {dtype} {'' if right else 'WRONG'} error "
                    f"{error:.1e}{' deterministic' if deterministic else ''}",
                    flush=True,
                )
    return int(wrong > 0)


class Experiment:
    """Prints and keeps rows until the time is over."""

    def __init__(self, device: torch.device, tokens: int, path: Path | None, end: float) -> None:
        self.device, self.tokens, self.path, self.end = device, tokens, path, end
        self.results: dict[str, Any] = {"environment": environment(device), "rows": []}
        print(", ".join(f"{key} {value}" for key, value in self.results["environment"].items()))

    def say(self, **row: Any) -> None:
        self.results["rows"].append(row)
        print(", ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
        if self.path is not None:
            write_json(self.path, self.results)

    def is_right(self, kernel: str) -> bool:
        reason = available_backends("syrk_").get(kernel.split()[0], "there is no such backend")
        if reason is not None:
            self.say(part="check", kernel=kernel, missing=reason)
            return False
        command = [sys.executable, __file__, "--check", kernel, "--device", str(self.device)]
        try:
            code = subprocess.run(command, timeout=CHECK_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = -1
        self.say(part="check", kernel=kernel, right=code == 0)
        return code == 0

    def times(self, width: int, kernels: list[str]) -> None:
        """With statistics and without, alone and back to back, and each as a ratio to addmm."""
        xs = inputs(self.tokens, width, self.device)
        runs = {"addmm": self.baseline(width)}
        for kernel in kernels:
            runs[kernel] = self.call(kernel, width)
            runs[f"{kernel} plain"] = self.call(kernel, width, with_statistics=False)
        for part, timed in (("alone", self.alone), ("back to back", self.back_to_back)):
            if time.monotonic() > self.end:
                return
            found = {name: 1e3 * timed(run, xs) for name, run in runs.items()}
            ratios = {name: found["addmm"] / value for name, value in found.items()}
            self.say(part=part, width=width, ms=found, faster=ratios)

    def tokens_against_time(self, width: int, kernels: list[str]) -> None:
        runs = {"addmm": self.baseline(width)}
        runs |= {kernel: self.call(kernel, width) for kernel in kernels}
        for tokens in (1024, 2048, 4096, 8192, 16384):
            if time.monotonic() > self.end:
                return
            xs = inputs(tokens, width, self.device)
            found = {name: 1e3 * self.alone(run, xs) for name, run in runs.items()}
            self.say(part="tokens", width=width, tokens=tokens, ms=found)

    def baseline(self, width: int) -> Run:
        c = zeros(width, self.device)
        return lambda x: addmm_baseline(c, x)

    def call(self, kernel: str, width: int, with_statistics: bool = True) -> Run:
        c = zeros(width, self.device)
        into = statistics(width, self.device) if with_statistics else (None, None)
        return lambda x: add(kernel, c, x, *into)

    def alone(self, run: Run, xs: list[Tensor]) -> float:
        return measure(run, xs, self.device, ahead=True).p50

    def back_to_back(self, run: Run, xs: list[Tensor]) -> float:
        """Seconds a call, of about half a second of them."""
        calls = max(3, int(0.5 / max(self.alone(run, xs), 2e-5)))

        def many(_: None) -> None:
            for index in range(calls):
                run(xs[index % len(xs)])

        return measure(many, [None], self.device, repeats=1, warm_up=0).p50 / calls


def inputs(
    tokens: int, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Two inputs in turn, with some outliers."""
    torch.manual_seed(0)
    made = [torch.randn(tokens, width, device=device).to(dtype) for _ in range(2)]
    for x in made:
        x[::97, ::31] *= 9
    return made


def zeros(width: int, device: torch.device) -> Tensor:
    return torch.zeros(width, width, device=device)


def statistics(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Absmax and counts, to be added to."""
    count = torch.zeros(width, dtype=torch.int64, device=device)
    return torch.zeros(width, device=device), count


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {shown(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
