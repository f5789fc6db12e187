"""CPU seconds of calibration by how many tokens of several batches run together.

    python benches/together.py MODEL [--tokens N] [--lengths N,N] [--together N,N]

The text is random tokens, given sequence by sequence. 0 runs each by itself; the covariances of all
ways are compared with those first.
"""

from __future__ import annotations

import argparse
import time

import torch

from corda_kernels import calibrate, load_model
from corda_kernels.calibration import run


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--lengths", type=numbers, default=[64, 512])
    parser.add_argument("--together", type=numbers, default=[0, 512, 2048, 8192])
    given = parser.parse_args()
    model = load_model(given.model)
    generator = torch.Generator().manual_seed(0)
    calibrate(model, [torch.ones(1, 8, dtype=torch.int64)], progress=False)  # loads libraries
    for length in given.lengths:
        shape = (given.tokens // length, length)
        batches = list(torch.randint(100, 1000, shape, generator=generator).split(1))
        expected = None
        for together in given.together:
            run._TOGETHER = {True: together, False: together}
            wall, cpu = time.perf_counter(), time.process_time()
            found = calibrate(model, batches, progress=False)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            expected = expected or found
            error = max(
                float((part.matrix - expected[names[0]].matrix).norm() / part.matrix.norm())
                for part, names in found.groups()
            )
            says = f"{shape[0]} × {length}, {together} together: {cpu:.1f} s of CPU, {wall:.1f} s"
            print(f"{says}, difference {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
