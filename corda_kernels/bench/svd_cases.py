"""What `bench svd` decomposes: the layers of a model, and layers made up in a model's shapes."""

from __future__ import annotations

import math
from collections import Counter
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
# Cases by name: the number of blocks, and the shapes of one.
_BLOCKS = {
    "smollm2-block": (1, _SMOLLM2),
    "llama2-7b": (32, _LLAMA2),
    **{f"{out}x{width}": (1, [[(out, width)]]) for shapes in _LLAMA2 for out, width in shapes},
}
CASES = ("model", *_BLOCKS)

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
        sizes = Counter({id(C): C.numel() for C in self.covariances.values()})
        for name, weight in self.weights.items():
            sizes[id(self.covariances[name])] += weight.numel()
        return 3 * 8 * sum(size for _, size in sizes.most_common(groups))


def make_case(
    name: str,
    device: torch.device,
    rank: int | None = None,
    source: tuple[str, str] | None = None,
) -> Case:
    """The case of that name; `rank` None for 32 with SmolLM2 and 128 with LLaMA-2, `source` the
    model and its covariance file, of the case "model" only.

    Cases other than "model" are made up: Gaussian weights, covariances by `realistic_covariance`.
    Each of the 32 blocks of "llama2-7b" has the tensors of the first.

    Raises:
        ConfigError: as in `check_case`.
    """
    check_case(name, rank, source)
    rank = rank or (32 if name in ("model", "smollm2-block") else 128)
    if name == "model" and source is not None:
        return _model_case(*source, rank, device)
    generator = torch.Generator(device).manual_seed(0)
    weights: dict[str, Tensor] = {}
    covariances: dict[str, Tensor] = {}
    blocks, inputs = _BLOCKS[name]
    for index, shapes in enumerate(inputs):
        C = realistic_covariance(shapes[0][1], generator)
        for number, (out, width) in enumerate(shapes):
            W = torch.randn(out, width, device=device, generator=generator) / math.sqrt(width)
            layers = [f"{block}.{index}.{number}" for block in range(blocks)]
            weights |= dict.fromkeys(layers, W)
            covariances |= dict.fromkeys(layers, C)
    return Case(name, weights, covariances, rank, [key for key in weights if key.startswith("0.")])


def check_case(name: str, rank: int | None, source: tuple[str, str] | None) -> None:
    """Makes sure, before any work is done, that `make_case` knows the case.

    Raises:
        ConfigError: there is no such case, it lacks its model and covariance file, or the rank is
            below 1.
    """
    if name not in CASES:
        raise ConfigError(f"there is no case {name!r}: give some of {', '.join(CASES)}")
    if name == "model" and source is None:
        raise ConfigError("the case model needs --model and --cov, its covariance file")
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank must be at least 1, not {rank}")


def _model_case(model: str, cov: str, rank: int, device: torch.device) -> Case:
    logging.disable_progress_bar()
    network = load_model(model)
    found = CovarianceSet.load(cov)
    moved = {id(c): c.matrix.to(device) for c, _ in found.groups()}
    # Copies: pages of a mapped file would otherwise be read while the clock runs.
    weights = {
        name: linear_weight(network.get_submodule(name)).detach().to(device, copy=True)
        for name in found
    }
    covariances = {name: moved[id(found[name])] for name in found}
    # An odd stride, 17 of the 210 layers of SmolLM2, does not keep meeting the same kinds.
    sampled = list(found)[:: max(1, len(found) // _SAMPLED) | 1]
    return Case(Path(model).name, weights, covariances, rank, sampled)


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
