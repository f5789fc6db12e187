"""What the constants for GPUs were chosen by: tiles of the SYRK, and streams of CO-SVD.

    python benches/tune_gpu.py tiles      # against torch.addmm, with and without channel statistics
    python benches/tune_gpu.py streams    # four blocks of LLaMA-2-7B's layers at rank 128

A tile is rows × columns × tokens of a step, warps, stages of the pipeline; a group, rows of tiles
that are visited together. Where a compiler refuses a configuration its line says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from svd_cases import make_case
from torch import Tensor

from corda_kernels.bench.covariance import addmm_baseline
from corda_kernels.bench.timing import environment, measure
from corda_kernels.kernels import syrk_, triton_syrk, use_backend
from corda_kernels.kernels.triton_syrk import TMA, TMA_WIDE, Tile
from corda_kernels.linalg import co_svd_layers, layers

NARROW = (TMA, TMA._replace(warps=8), TMA._replace(stages=3), TMA_WIDE)
WIDE = (TMA_WIDE, TMA_WIDE._replace(stages=3))
GROUPS = (4, 8, 1000)


def tiles(widths: Sequence[int], tokens: int, device: torch.device) -> None:
    """One line for each configuration at each width."""
    for width in widths:
        inputs = [torch.randn(tokens, width, device=device).bfloat16() for _ in range(2)]
        c = torch.zeros(width, width, device=device)
        absmax = torch.zeros(width, device=device)
        count = torch.zeros(width, dtype=torch.int64, device=device)

        def milliseconds(run: Callable[[Tensor], object], inputs: list[Tensor] = inputs) -> float:
            return 1e3 * measure(run, inputs, device, ahead=True).p50

        base = milliseconds(lambda x, c=c: addmm_baseline(c, x))
        rate = 2 * tokens * width**2 / base / 1e9
        print(f"{width} channels: addmm {base:.4f} ms, {rate:.0f} TFLOP/s", flush=True)
        name = "TMA_WIDE" if width >= triton_syrk._WIDE_CHANNELS else "TMA"
        for tile in WIDE if name == "TMA_WIDE" else NARROW:
            for group in GROUPS if tile == TMA_WIDE else GROUPS[:1]:
                setattr(triton_syrk, name, tile)
                triton_syrk._GROUP, triton_syrk._GROUPED_CHANNELS = group, 0
                try:
                    with use_backend("triton"):
                        full = milliseconds(
                            lambda x, c=c, a=absmax, n=count: syrk_(c, x, absmax=a, outlier_count=n)
                        )
                        plain = milliseconds(lambda x, c=c: syrk_(c, x))
                except Exception as error:  # the compiler's, of many kinds
                    print(f"  {_called(tile, group)}: {type(error).__name__}", flush=True)
                    continue
                print(
                    f"  {_called(tile, group)}: {full:.4f} ms with statistics, "
                    f"{plain:.4f} without; {base / full:.2f} and {base / plain:.2f} times as fast",
                    flush=True,
                )
        triton_syrk.TMA, triton_syrk.TMA_WIDE = TMA, TMA_WIDE


def _called(tile: Tile, group: int) -> str:
    return f"{'x'.join(map(str, tile))} group {group}"


def streams(case_name: str, rank: int | None, device: torch.device) -> None:
    """One line for each number of streams and end of the spectrum."""
    case = make_case(case_name, device, rank)
    names = [name for name in case.weights if int(name.split(".")[0]) < 4]
    weights = {name: case.weights[name] for name in names}
    covariances = {name: case.covariances[name] for name in names}
    for number in (0, 1, 2, 4, 8, 16):  # the first to warm up
        layers._STREAMS = number or 1
        for which in ("largest", "smallest"):
            started = time.perf_counter()
            for _ in co_svd_layers(weights, covariances, rank=case.rank, which=which, damping=0.01):
                pass
            spent = time.perf_counter() - started
            if number:
                print(
                    f"{number} streams, {which}: {len(names)} layers in {spent:.3f} s, "
                    f"{1e3 * spent / len(names):.1f} ms each",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("tiles", "streams"))
    parser.add_argument("--widths", default="576,1536,2048,4096,8192,14336")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--case", default="llama2-7b")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device = torch.device(given.device)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))
    if given.what == "tiles":
        tiles([int(width) for width in given.widths.split(",")], given.tokens, device)
    else:
        streams(given.case, given.rank, device)


if __name__ == "__main__":
    main()
