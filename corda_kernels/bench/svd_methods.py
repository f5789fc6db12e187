"""Ways to one end of the spectrum of W·C: ours, PEFT's, and what else torch offers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from corda_kernels.bench.svd_cases import DAMPING, Case
from corda_kernels.linalg import co_svd_layers

End = Literal["largest", "smallest"]
ENDS: tuple[End, ...] = ("largest", "smallest")

# Drivers of cuSOLVER. torch names gesvdp in its own heuristics only; where it lets itself be asked
# for by name, it runs.
_DRIVERS = ("gesvd", "gesvdj", "gesvda", "gesvdp")


@dataclass(frozen=True, eq=False)
class Part:
    """One end of one layer: U (out, rank) and A (rank, in) with B A = U·A; None for UᵀW."""

    U: Tensor
    A: Tensor | None = None


Parts = dict[End, dict[str, Part]]


@dataclass(frozen=True)
class Method:
    """A way to decompose the layers of a case.

    Attributes:
        name: as printed.
        run: the case and the ends wanted → the parts, by end and layer.
        ends: the ends that it is meant for.
        at_once: whether one run yields them all.
        allowed: the largest errors, by end, up to which its speed is worth printing.
    """

    name: str
    run: Callable[[Case, Iterable[End]], Parts]
    ends: tuple[End, ...]
    at_once: bool
    allowed: Mapping[End, float]


# Ours is held to what the package promises, float32 to what it can do at its best.
_EXACT: dict[End, float] = {"largest": 1e-5, "smallest": 1.001}
_SINGLE: dict[End, float] = {"largest": 1e-2, "smallest": 1.01}


def methods(device: torch.device) -> dict[str, Method]:
    """Those that this machine has, the published procedure first, by name."""
    found = []
    if published_missing() is None:
        found.append(Method("published", _published, ENDS, True, _SINGLE))
    found.append(Method("ours", _ours, ENDS, False, _EXACT))
    found.append(Method("svd_lowrank", _lowrank, ("largest",), False, _SINGLE))
    if device.type == "cuda":
        found += [
            Method(driver, partial(_driver, driver), ENDS, True, _EXACT)
            for driver in _DRIVERS
            if _reachable(driver, device)
        ]
    return {method.name: method for method in found}


def published_missing() -> str | None:
    """Why PEFT's procedure cannot run here: it imports attrs, which PEFT does not depend on."""
    try:
        importlib.import_module("peft.tuners.lora.corda")
    except ImportError as error:
        return str(error)
    return None


def _ours(case: Case, ends: Iterable[End]) -> Parts:
    return {
        which: {
            name: Part(found.U)
            for name, found in co_svd_layers(
                case.weights, case.covariances, rank=case.rank, which=which, damping=DAMPING
            )
        }
        for which in ends
    }


def _published(case: Case, ends: Iterable[End]) -> Parts:
    """PEFT's own: the inverse of C and a full SVD of W·C, in float32, layer by layer."""
    from peft.tuners.lora.corda import collect_eigens_for_layer

    parts: Parts = {which: {} for which in ends}
    for name, W in case.weights.items():
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(W, requires_grad=False)
        linear.covariance_matrix = case.covariances[name]
        eigens = collect_eigens_for_layer(linear, None)
        for which, part in parts.items():
            chosen = _chosen(which, case.rank)
            A = eigens.S_WC.cpu()[chosen, None] * eigens.V_WC[:, chosen].mT
            part[name] = Part(eigens.U_WC[:, chosen].clone(), A)
    return parts


def _lowrank(case: Case, ends: Iterable[End]) -> Parts:
    """torch.svd_lowrank of W·C, in float32, with half as many vectors again and its two rounds."""
    parts: Parts = {which: {} for which in ends}
    for name, W in case.weights.items():
        M = W @ _damped(case.covariances[name])
        U = torch.svd_lowrank(M, min(case.rank + case.rank // 2, *M.shape))[0][:, : case.rank]
        for part in parts.values():
            part[name] = Part(U)
    return parts


def _driver(driver: str, case: Case, ends: Iterable[End]) -> Parts:
    """One of cuSOLVER's drivers on W·C in float64, layer by layer."""
    parts: Parts = {which: {} for which in ends}
    for name, W in case.weights.items():
        M = W.double() @ _damped(case.covariances[name].double())
        U, _, _ = torch.linalg.svd(M, full_matrices=False, driver=driver)
        for which, part in parts.items():
            part[name] = Part(U[:, _chosen(which, case.rank)].clone())
    return parts


def _reachable(driver: str, device: torch.device) -> bool:
    try:
        torch.linalg.svd(torch.eye(2, device=device), driver=driver)
    except RuntimeError:
        return False
    return True


def _chosen(which: End, rank: int) -> slice:
    return slice(rank) if which == "largest" else slice(-rank, None)


def _damped(C: Tensor) -> Tensor:
    diagonal = C.diagonal()
    return C + torch.diag((DAMPING * diagonal.mean()).expand(diagonal.shape))
