"""What `bench svd` decomposes: the layers of a model, and layers made up in a model's shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import ConfigError
from corda_kernels.linears import linear_weight
from corda_kernels.models import load_model

DAMPING = 0.01  # PEFT's, and the default of `init`

# (out, in) of the linear layers of a block, those with the same input together.
_SMOLLM2 = [[(576, 576), (192, 576), (192, 576)], [(576, 576)], [(1536, 576)] * 2, [(576, 1536)]]
_LLAMA2 = [[(4096, 4096)] * 3, [(4096, 4096)], [(11008, 4096)] * 2, [(4096, 11008)]]
_BLOCKS = {"smollm2-block": (1, _SMOLLM2), "llama2-7b": (32, _LLAMA2)}
_SINGLE = {f"{out}x{width}": (out, width) for layers in _LLAMA2 for out, width in layers}

CASES = ("model", *_BLOCKS, *_SINGLE)

_SAMPLED = 12  # layers of a model that errors are taken of, about


@dataclass(frozen=True, eq=False)
class Case:
    """Layers to decompose.

    Attributes:
        name: as printed.
        weights: (out, in) by layer, float32.
        covariances: (in, in) by layer, the very same tensor where layers share an input.
        rank: number of components.
        sampled: layers that errors are taken of.
    """

    name: str
    weights: dict[str, Tensor]
    covariances: dict[str, Tensor]
    rank: int
    sampled: list[str]

    def memory_bound(self, groups: int) -> int:
        """Bytes of three float64 copies of what is worked on at a time: the `groups` largest of the
        covariances, each with the layers that share it."""
        sizes: dict[int, int] = {}
        for name, weight in self.weights.items():
            C = self.covariances[name]
            sizes.setdefault(id(C), 8 * C.numel())
            sizes[id(C)] += 8 * weight.numel()
        return 3 * sum(sorted(sizes.values(), reverse=True)[:groups])


def make_case(
    name: str,
    device: torch.device,
    rank: int | None = None,
    model: str | None = None,
    cov: str | None = None,
) -> Case:
    """The case of that name; `rank` None for 32 with SmolLM2 and 128 with LLaMA-2.

    Cases other than "model" are made up: Gaussian weights, covariances by `realistic_covariance`.
    Each of the 32 blocks of "llama2-7b" has the tensors of the first.

    Raises:
        ConfigError: as in `check_case`.
    """
    check_case(name, rank, model, cov)
    if rank is None:
        rank = 32 if name in ("model", "smollm2-block") else 128
    if model is not None and cov is not None and name == "model":
        return _model_case(model, cov, rank, device)
    blocks, shapes = _BLOCKS[name] if name in _BLOCKS else (1, [[_SINGLE[name]]])
    return _made_up(name, blocks, shapes, rank, device)


def check_case(name: str, rank: int | None, model: str | None, cov: str | None) -> None:
    """Makes sure, before any work is done, that `make_case` knows the case.

    Raises:
        ConfigError: there is no such case, it lacks its model and covariance file, or the rank is
            below 1.
    """
    if name not in CASES:
        raise ConfigError(f"there is no case {name!r}: give some of {', '.join(CASES)}")
    if name == "model" and (model is None or cov is None):
        raise ConfigError("the case model needs --model and --cov, its covariance file")
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank must be at least 1, not {rank}")


def _model_case(model: str, cov: str, rank: int, device: torch.device) -> Case:
    logging.disable_progress_bar()
    network = load_model(model)
    covariances = CovarianceSet.load(cov)
    moved = {id(c): c.matrix.to(device) for c, _ in covariances.groups()}
    # Copies: pages of a mapped file would otherwise be read while the clock runs.
    weights = {
        name: linear_weight(network.get_submodule(name)).detach().to(device, copy=True)
        for name in covariances
    }
    names = list(weights)
    # An odd stride, 17 of the 210 layers of SmolLM2, does not keep meeting the same kinds.
    sampled = names[:: max(1, len(names) // _SAMPLED) | 1]
    return Case(
        Path(model).name,
        weights,
        {name: moved[id(covariances[name])] for name in names},
        rank,
        sampled,
    )


def _made_up(
    name: str,
    blocks: int,
    shapes: list[list[tuple[int, int]]],
    rank: int,
    device: torch.device,
) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    weights, covariances = {}, {}
    for index, shared in enumerate(shapes):
        C = realistic_covariance(shared[0][1], generator)
        for number, (out, width) in enumerate(shared):
            W = torch.randn(out, width, device=device, generator=generator) / math.sqrt(width)
            for block in range(blocks):
                weights[f"{block}.{index}.{number}"] = W
                covariances[f"{block}.{index}.{number}"] = C
    return Case(name, weights, covariances, rank, [key for key in weights if key.startswith("0.")])


def realistic_covariance(channels: int, generator: torch.Generator) -> Tensor:
    """C (channels, channels) in float32, on the generator's device: a spectrum log-spaced over six
    decades between dense directions, uneven channels, and one in 512 an outlier, 30 times as loud.

    A circulant matrix has the spectrum of its first row, so that no orthogonal matrix of this size
    needs to be made.
    """
    device = generator.device
    spectrum = torch.logspace(0, -6, channels // 2 + 1, dtype=torch.float64, device=device)
    row = torch.fft.irfft(spectrum, channels)
    circulant = torch.cat([row, row]).unfold(0, channels, 1)[1:].flip(0)
    scale = torch.randn(channels, dtype=torch.float64, device=device, generator=generator)
    scale = scale.mul(0.5).exp()
    loud = torch.randperm(channels, device=device, generator=generator)
    scale[loud[: max(1, channels // 512)]] *= 30
    return (circulant * scale[:, None] * scale).float()
