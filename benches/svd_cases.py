"""What `svd.py` decomposes, and how far a decomposition is from a float64 reference.

The layers are those of a model, or made up in a model's shapes. Errors are in the terms that matter
to an adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import ConfigError
from corda_kernels.linalg import End, parallel_map
from corda_kernels.linears import linear_weight
from corda_kernels.models import load_model

DAMPING = 0.01  # PEFT's, and the default of `init`
EPS = torch.finfo(torch.float64).eps

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
ENDS: tuple[End, ...] = ("largest", "smallest")
# Up to this many rows or columns a float64 reference takes a second or less.
_QUICK = 2048

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

    @property
    def quick(self) -> bool:
        """Whether float64 references of all layers take a second or less each."""
        return max(max(weight.shape) for weight in self.weights.values()) <= _QUICK


def make_case(
    name: str,
    device: torch.device,
    rank: int | None = None,
    source: tuple[str, str] | None = None,
) -> Case:
    """The case of that name, which `check_case` accepts; `rank` None for 32 with SmolLM2 and 128
    with LLaMA-2, `source` the model and its covariance file, of the case "model" only.

    Cases other than "model" are made up: Gaussian weights, covariances by `realistic_covariance`.
    Each of the 32 blocks of "llama2-7b" has the tensors of the first.
    """
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


@dataclass(frozen=True, eq=False)
class Part:
    """One end of one layer: U (out, rank) and A (rank, in) with B A = U·A; None for UᵀW."""

    U: Tensor
    A: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    """One layer in float64, decomposed by a dense SVD.

    Attributes:
        W: (out, in), the weight.
        M: (out, in), W·(C + λI).
        U: (out, R), left singular vectors of M; R = min(out, in).
        S: (R), its singular values, descending.
    """

    W: Tensor
    M: Tensor
    U: Tensor
    S: Tensor


def reference(
    weight: Tensor,  # (out, in)
    covariance: Tensor,  # (in, in)
    damping: float | None,
) -> Reference:
    """Decomposes W·(C + λI) by torch.linalg.svd of its triangular factor, λ = damping·mean diag C.

    With a condition of 1e8 to 1e12 a plain SVD of M may be off by eps·cond at the small end, by as
    much as is to be measured. The errors of QR of Mᵀ, which goes first, follow the norms of the
    rows of M one by one, and the SVD of the triangle does better than its bound: an inverse
    iteration agrees with it to 1e-8 in the energy of the tail at conditions of 1e11. A tall W is
    replaced by its own triangular factor, so that U lies in the range of W also where C is
    singular.
    """
    W, C = weight.double(), covariance.to(weight.device, torch.float64, copy=True)
    if damping:
        C.diagonal().add_(damping * C.diagonal().mean())
    Q, inner = torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)
    U, S, _ = torch.linalg.svd(torch.linalg.qr((inner @ C).mT, mode="r").R.mT)
    return Reference(W, W @ C, U if Q is None else Q @ U, S)


def adapter_error(BA: Tensor, exact: Reference, which: End, rank: int) -> float:
    """‖BA − BA_ref‖/‖BA_ref‖ (Frobenius) for BA (out, in) = B A, BA_ref = U_I U_Iᵀ W."""
    U = exact.U[:, :rank] if which == "largest" else exact.U[:, -rank:]
    expected = U @ (U.mT @ exact.W)
    return float((BA.double() - expected).norm() / expected.norm())


def tail_energy_ratio(U: Tensor, exact: Reference) -> float:
    """‖UᵀM‖_F over the least possible, (Σ σ²)^½ of the smallest, for U (out, rank); 1 is optimal.

    Energies up to rank·(R·eps·σ₁)² are rounding: of exactly null directions both count as that.
    """
    rank = U.shape[-1]
    level = rank * float(exact.S.shape[0] * EPS * exact.S[0]) ** 2
    energy = float((U.double().mT @ exact.M).square().sum())
    least = float(exact.S[-rank:].square().sum())
    if max(energy, least) <= level:
        return 1.0
    return math.sqrt(max(energy, level) / max(least, level))


def references(case: Case) -> dict[str, Reference]:
    """The sampled layers of a case, in float64, on the CPU."""

    def one(name: str) -> Reference:
        return reference(case.weights[name].cpu(), case.covariances[name].cpu(), DAMPING)

    several = parallel_map if case.quick else map
    return dict(zip(case.sampled, several(one, case.sampled), strict=True))


def end_error(parts: dict[str, Part], truths: dict[str, Reference], which: End) -> float:
    """The largest error of one end over the layers in `truths`: for the largest components
    `adapter_error`, for the smallest `tail_energy_ratio`."""

    def error(part: Part, truth: Reference) -> float:
        U = part.U.cpu().double()
        if which == "smallest":
            return tail_energy_ratio(U, truth)
        A = U.mT @ truth.W if part.A is None else part.A.cpu().double()
        return adapter_error(U @ A, truth, which, U.shape[-1])

    return max(error(parts[name], truth) for name, truth in truths.items())
