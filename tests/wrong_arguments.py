"""What calls are tried with: values that no argument may have, and a world to call in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from torch import Tensor, nn

import corda_kernels as ck
from corda_kernels import kernels
from corda_kernels.calibration import Covariance
from corda_kernels.peft_corda import patch_peft, preprocess_corda
from corda_kernels.planning import Stability

NAN, INF = math.nan, math.inf
W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
C = torch.eye(5) + 0.1
LONG = 10**5000  # Python writes no number of so many digits

OTHERS: list[Any] = [None, "text", 5, [1], object()]
# Of a tensor of floating numbers.
TENSORS: list[Any] = [None, "text", 1.5, [[1.0]], np.eye(5, dtype=np.float32)]
WHOLE: list[Any] = [1.5, True, "8", NAN, INF, [1], torch.tensor([1, 2]), 1j]
COUNTS: list[Any] = [*WHOLE, 0, -1]
REAL: list[Any] = [NAN, "0.1", True, 1j, [1.0], torch.ones(2), -1, -INF, b"1"]
FINITE: list[Any] = [*REAL, INF, 10**400]
DAMPINGS: list[Any] = [*FINITE, 1e308]
SEEDS: list[Any] = [*WHOLE, 2**64, -(2**63) - 1, LONG]
CHOICES: list[Any] = ["other", 5, ["auto"], b"auto", torch.ones(2), np.ones(2)]
FLAGS: list[Any] = ["no", 0, 1, None, [True]]
NAMES: list[Any] = [5, [1], ["q_proj", 1], b"q_proj", NAN, object()]
PATHS: list[Any] = ["x" * 300, "a\0b", 5, 1.5, b"a", None, ["a"], "\ud800"]
DEVICES: list[Any] = ["gpu", "meta", "cuda:99", [1], 1.5, None]
DTYPES: list[Any] = [
    "int4", 5, ["float32"], torch.int8, torch.complex64, torch.float8_e4m3fn, np.ones(2)
]  # fmt: skip
MASKS: list[Any] = [
    torch.full((2, 8), 2),
    torch.full((2, 8), 0.5),
    torch.full((2, 8), -1),
    torch.full((2, 8), NAN),
    torch.zeros(2, 8).index_fill(1, torch.tensor([7]), -INF),
    torch.ones(2, 8).to_sparse(),
    torch.ones(2, 8, device="meta"),
    torch.ones(2, 8) * 1j,
    np.ones((2, 8)),
    [[1] * 8] * 2,
]
IDS: list[Any] = [
    torch.ones(2, 8, dtype=dtype)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.bool, torch.float32, torch.complex64)
] + [
    torch.ones(2, 8, dtype=torch.int64).to_sparse(),
    torch.ones(2, 8, dtype=torch.int64, device="meta"),
    np.ones((2, 8), dtype=np.int64),
    [[1] * 8] * 2,
]


def odd_tensors(good: Tensor) -> list[Any]:
    """Tensors of the same shape, of which nothing could be computed right."""
    kinds = (torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn)
    return TENSORS + [good.to(kind) for kind in kinds] + [good.to_sparse(), good.to("meta")]


WEIGHTS = [*odd_tensors(W), torch.empty(6, 0), W[0], W * NAN, W[:, :4]]
COVARIANCES = [*odd_tensors(C), torch.empty(0, 0), C[0], C * NAN, C[:4, :4], C.tril()]
SQUARES = [*odd_tensors(C), torch.empty(0, 0), C[0], C[:4], C.half()]


@dataclass(frozen=True)
class World:
    """What calls are made with.

    Attributes:
        model: tiny.
        covariances: of its layers.
        folder: with a model in `base`, an adapter in `adapter`, covariances in `cov` and a text.
        tokenizer: stands in for one.
    """

    model: nn.Module
    covariances: ck.CovarianceSet
    folder: Path
    tokenizer: Any

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {name: self.model.get_submodule(name) for name in self.covariances}


def config(**options: Any) -> ck.CordaConfig:
    return ck.CordaConfig(**({"mode": "kpm", "rank": 4, "progress": False} | options))


def batch(**changes: Any) -> dict[str, Any]:
    ones = torch.ones(2, 8, dtype=torch.int64)
    return {"input_ids": ones, "attention_mask": ones} | changes


def covariance(**changes: Any) -> Covariance:
    values = {
        "matrix": C,
        "tokens": 10,
        "calls": 1,
        "absmax": torch.ones(5),
        "outlier_count": torch.zeros(5, dtype=torch.int64),
        "outlier_threshold": 6.0,
    }
    return Covariance(**(values | changes))


def covariance_set(**changes: Any) -> ck.CovarianceSet:
    values = {"covariances": {"a": covariance()}, "normalize": "tokens", "left_out": None}
    return ck.CovarianceSet(**(values | {"provenance": None} | changes))


def adapted(world: World) -> nn.Module:
    return ck.init_corda(
        copy.deepcopy(world.model), world.covariances, config(residual="weight"), use_peft=False
    )


def preprocess(model: Any, mask: Any, **options: Any) -> None:
    lora = LoraConfig(
        init_lora_weights="corda",
        target_modules=["q_proj"],
        r=4,
        corda_config=PeftCordaConfig(corda_method="kpm"),
    )

    def run() -> None:
        model(input_ids=torch.ones(2, 8, dtype=torch.int64), attention_mask=mask)

    model = copy.deepcopy(model)
    preprocess_corda(model, **({"lora_config": lora, "run_model": run} | options))


def in_backend(name: Any) -> None:
    with kernels.use_backend(name):
        pass


def scheduled(model: Any) -> None:
    with ck.RankSchedule("linear", 1.0, 1.0, 4).apply(model) as ranks:
        ranks.ranks.append(1.0)  # as if it had generated


def patched(**options: Any) -> None:
    patch_peft(**options).restore()


def mixed(world: World, **options: Any) -> Any:
    return ck.mix_covariances(**({"sets": [world.covariances] * 2, "weights": [1, 1]} | options))


def stability_of(entry: Any, **changes: Any) -> Stability:
    layers = {"a": entry}
    note = {"rank": 4, "damping": 0.01, "tokens": [5, 5], "layers": layers}
    return Stability.from_json(note | changes)


@dataclass(frozen=True)
class Case:
    """A public function: how it is called, with which arguments, and which it refuses."""

    call: Callable[..., Any]
    good: Callable[[World], dict[str, Any]]
    wrong: dict[str, list[Any]]
