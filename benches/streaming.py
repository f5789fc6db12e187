"""Peak memory of calibration in one pass and block by block, each in a process of its own (Linux).

Printed for each way: by how much its peak exceeds that of the bare forward passes over the same
text, beside what it should be: all covariances, or those of the largest block and the hidden
states. The numbers of both ways must agree, which is checked first.

    python benches/streaming.py MODEL TEXT [--field NAME] [--samples N] [--seq-len N]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import torch

from corda_kernels.memory import forget_peak, peak_bytes


def load(given: argparse.Namespace) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    from transformers.utils import logging

    from corda_kernels import load_model, load_tokenizer, token_batches

    logging.disable_progress_bar()
    model = load_model(given.model)
    batches = token_batches(
        given.text,
        load_tokenizer(given.model),
        samples=given.samples,
        seq_len=given.seq_len,
        field=given.field,
    )
    return model, batches


@torch.no_grad()
def run(given: argparse.Namespace) -> None:
    """One way, in this process; prints its peak, its seconds and a number that all ways share."""
    from corda_kernels import calibrate, calibrate_blocks

    model, batches = load(given)
    model.base_model(**batches[0], use_cache=False)
    forget_peak()
    started = time.perf_counter()
    checksum = 0.0
    if given.way == "forward":
        for batch in batches:
            model.base_model(**batch, use_cache=False)
    elif given.way == "one":
        found = calibrate(model, batches, progress=False)
        checksum = sum(float(covariance.matrix.norm()) for covariance, _ in found.groups())
    else:
        for block in calibrate_blocks(model, batches, progress=False):
            checksum += sum(float(covariance.matrix.norm()) for covariance, _ in block.groups())
            del block
    print(peak_bytes(), time.perf_counter() - started, checksum)


def measured(given: argparse.Namespace, way: str) -> tuple[int, float, float]:
    command = [sys.executable, __file__, given.model, given.text, "--way", way]
    for name in ("field", "samples", "seq_len"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    # Freed memory goes back to the system at once, so that the peak is of what is in use.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, check=True, capture_output=True, env=environment, text=True)
    size, seconds, checksum = printed.stdout.split()
    return int(size), float(seconds), float(checksum)


def main(given: argparse.Namespace) -> int:
    from corda_kernels.calibration.needs import calibration_needs
    from corda_kernels.models import load_skeleton
    from corda_kernels.outputs import format_bytes

    needs = calibration_needs(load_skeleton(given.model), seq_len=given.seq_len)
    assert needs.block_bytes is not None
    hidden = given.samples * given.seq_len * needs.hidden_bytes
    expected = {
        "one": needs.covariance_bytes,
        "blocks": max(needs.block_bytes.values()) + hidden,
    }
    bare, seconds, _ = measured(given, "forward")
    results = {way: measured(given, way) for way in expected}
    one, blocks = (results[way][2] for way in ("one", "blocks"))
    if abs(one - blocks) > 1e-6 * one:
        print(f"the covariances differ: {one} and {blocks}")
        return 1
    print(
        f"{given.samples} × {given.seq_len} tokens; forward passes {seconds:.1f} s, "
        f"peak {format_bytes(bare)}"
    )
    print(
        f"hidden states {format_bytes(hidden)}, covariances of the largest block "
        f"{format_bytes(max(needs.block_bytes.values()))}, of all "
        f"{format_bytes(needs.covariance_bytes)}"
    )
    for way, (size, seconds, _) in results.items():
        print(
            f"{way:8} {seconds:6.1f} s, over the forward passes' peak {format_bytes(size - bare)}"
            f" (computed {format_bytes(expected[way])})"
        )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--field", default="text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.exit(run(arguments) if arguments.way else main(arguments))
