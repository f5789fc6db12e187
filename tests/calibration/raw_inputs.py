"""What linear layers read, by hooks of the tests' own, and covariances held to that."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from corda_kernels.calibration import CovarianceSet


def random_ids(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape)


def linear_names(model: nn.Module) -> list[str]:
    """Every layer that holds a matrix and is neither embedding nor head."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    ]


@torch.no_grad()
def inputs_read(model: nn.Module, sequences: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """What each linear layer reads, call by call, as (n, in) float64, by hooks of our own."""
    read: dict[str, list[Tensor]] = {name: [] for name in linear_names(model)}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: read[name].append(args[0].flatten(0, -2).double())
        )
        for name in read
    ]
    for ids in sequences:
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return read


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(found: CovarianceSet, read: dict[str, list[Tensor]], *, tolerance: float) -> None:
    """Holds every covariance to (1/n) Σ x xᵀ over all inputs read, in float64."""
    assert list(found) == list(read)
    for name, covariance in found.items():
        x = torch.cat(read[name])
        assert covariance.tokens == len(x), name
        assert distance(covariance.matrix, x.T @ x / len(x)) < tolerance, name
        assert torch.equal(covariance.matrix, covariance.matrix.T), name
        assert distance(covariance.absmax, x.abs().amax(0)) < tolerance, name


def pad(sequences: list[Tensor], side: str) -> dict[str, Tensor]:
    """One batch of all sequences (length,), padded on one side with a token that is also text."""
    longest = max(len(ids) for ids in sequences)

    def row(ids: Tensor, fill: int) -> Tensor:
        padding = torch.full((longest - len(ids),), fill)
        return torch.cat([ids, padding] if side == "right" else [padding, ids])

    return {
        "input_ids": torch.stack([row(ids, 5) for ids in sequences]),
        "attention_mask": torch.stack([row(torch.ones_like(ids), 0) for ids in sequences]),
    }


class Flat(nn.Module):
    """A model whose layer reads tokens already flattened, beside a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 6)
        self.used = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.used(self.embedding(input_ids).flatten(0, 1))
