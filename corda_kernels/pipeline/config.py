"""How to make an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from corda_kernels.decomposition.damping import check_damping
from corda_kernels.errors import ConfigError
from corda_kernels.initialization.factors import BALANCES, STEPS, Balance, Step
from corda_kernels.planning.compactness import CONDITIONS, Condition
from corda_kernels.planning.ranks import check_bounds, whole_number
from corda_kernels.planning.selection import METHODS, Method

# What torch.Generator takes.
_SEEDS = (-(2**63), 2**64 - 1)


@dataclass(frozen=True)
class CordaConfig:
    """How to make an adapter.

    Attributes:
        mode: "kpm" trains the smallest components and calibrates on the knowledge to keep; "ipm"
            trains the largest and calibrates on the new task.
        rank: number of components of every layer; with a budget no more than the rank at which
            the stability is judged.
        budget: shares so many adapter parameters out over the layers instead: a number of them, a
            share of the model (0.01 or "1%"), or "r=128", what that rank would take in all layers.
        min_rank: what every layer gets at least of a budget.
        max_rank: what a layer gets at most of a budget; None for all it can have.
        rank_multiple: of which every rank under a budget is a multiple.
        candidates: into how many candidates to deal the batches out, one after the other in turn,
            each a sample of its own.
        selection: "argmin" keeps for each layer the candidate with the lowest score, as CorDA++
            does; "pool" takes all of them together. See `select_covariance`.
        condition: π in the scores of selection and budget; see `corda_kernels.compactness`.
        balance: "even" or "paper", how the factors share their magnitude; see `adapter_factors`.
        step: None, or "lora" for first optimiser steps of plain LoRA's size.
        residual: "pair" leaves the base untouched and subtracts the initial product beside it;
            "weight" writes W − B A into the base, as the paper does, and in a narrow dtype lets the
            trainable A and B start where they make up for its rounding; see `compensated`.
        damping: added to each covariance, times its mean diagonal; None for none. Scores cannot do
            without and take 0.01 then.
        targets: the layers; see `corda_kernels.models.target_linears`.
        method: of the decomposition; see `co_svd`.
        seed: of the randomised method.
        stability: whether to find out, where batches are given, if there were enough of them, by
            decomposing two halves of them as well; not with several candidates.
        memory_limit: of the covariances, in bytes; if all of them take more, the model is
            calibrated and decomposed block by block, which no budget can be shared out in. None
            for no limit.
        distributed: whether the ranks of torch.distributed share the work; all of them are given
            the same model and batches, and end up with the same adapter.
        progress: whether to show progress bars.
    """

    mode: Literal["kpm", "ipm"]
    rank: int = 32
    budget: int | float | str | None = None
    min_rank: int = 0
    max_rank: int | None = None
    rank_multiple: int = 1
    candidates: int = 1
    selection: Method = "argmin"
    condition: Condition = "ratio"
    balance: Balance = "even"
    step: Step = None
    residual: Literal["pair", "weight"] = "pair"
    damping: float | None = 0.01
    targets: str | Sequence[str] = "all-linear"
    method: Literal["auto", "exact", "randomized"] = "auto"
    seed: int = 0
    stability: bool = True
    memory_limit: int | None = None
    distributed: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        for name, allowed in (
            ("mode", ("kpm", "ipm")),
            ("selection", METHODS),
            ("condition", CONDITIONS),
            ("balance", BALANCES),
            ("step", STEPS),
            ("residual", ("pair", "weight")),
            ("method", ("auto", "exact", "randomized")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        check_damping(self.damping)
        whole_number("candidates", self.candidates, 1)
        whole_number("rank", self.rank, 1)
        if not _SEEDS[0] <= self.seed <= _SEEDS[1]:
            raise ConfigError(f"seed must be within 64 bits, got {self.seed}")
        check_bounds(self.min_rank, self.max_rank, self.rank_multiple)
        bounds = (self.min_rank, self.max_rank, self.rank_multiple)
        if self.budget is None and bounds != (0, None, 1):
            raise ConfigError(
                "min_rank, max_rank and rank_multiple bound the ranks under a budget: give one, "
                'such as budget="r=32"'
            )

    @property
    def which(self) -> Literal["largest", "smallest"]:
        """The end of the spectrum that the mode trains."""
        return "largest" if self.mode == "ipm" else "smallest"
