"""Both ends of the spectrum of W·C against PEFT's procedure and torch.svd_lowrank.

The error is that of B A relative to float64 for the largest components, and for the smallest the
norm of the tail over the least possible, less 1: the worst over the layers. `corda-kernels bench
svd` takes the layers of a model.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, Contest, Sized
from svd import Parts, methods
from svd_cases import ENDS, Case, end_error, realistic_covariance, references

from corda_kernels.linalg import End

# (layers that share the input, out, in), rank: of SmolLM2-135M, and one that is a bit larger.
CASES = [(3, 576, 576, 32), (2, 1536, 576, 32), (1, 576, 1536, 32), (1, 1536, 1536, 64)]


def make(layers: int, outputs: int, inputs: int, rank: int) -> Case:
    generator = torch.Generator(DEVICE).manual_seed(0)
    C = realistic_covariance(inputs, generator)
    weights = {
        str(layer): torch.randn(outputs, inputs, device=DEVICE, generator=generator)
        / math.sqrt(inputs)
        for layer in range(layers)
    }
    return Case("", weights, dict.fromkeys(weights, C), rank, ["0"])


@pytest.mark.parametrize(("layers", "outputs", "inputs", "rank"), CASES)
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", ["published", "svd_lowrank", "ours"])
def test_svd(
    contest: Contest[Parts],
    sized: Sized,
    name: str,
    which: End,
    layers: int,
    outputs: int,
    inputs: int,
    rank: int,
) -> None:
    method = methods(DEVICE).get(name)
    if method is None:
        pytest.skip("PEFT's CorDA cannot be imported: install attrs")
    if which not in method.allowed:
        pytest.skip(f"{name} is not meant for the {which} components")
    case = make(layers, *map(sized, (outputs, inputs, rank)))

    def error(found: Parts) -> float:
        return end_error(found[which], references(case), which) - (which == "smallest")

    group = f"svd {layers} × {outputs} × {inputs}, rank {rank}, {which}"
    contest(group, lambda: method.run(case, [which]), error)
