"""Ways to one end of the spectrum of W·C: ours, PEFT's, and what else torch offers."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from corda_kernels.bench.svd_cases import DAMPING, Case
from corda_kernels.errors import ConfigError
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
        run: the case and the ends wanted → the parts, by end and layer.
        ends: the ends that it is meant for.
        at_once: whether one run yields them all.
        allowed: the largest errors, by end, up to which its speed is worth printing.
    """

    run: Callable[[Case, Iterable[End]], Parts]
    ends: tuple[End, ...]
    at_once: bool
    allowed: Mapping[End, float]


# Ours is held to what the package promises, float32 to what it can do at its best.
_EXACT: dict[End, float] = {"largest": 1e-5, "smallest": 1.001}
_SINGLE: dict[End, float] = {"largest": 1e-2, "smallest": 1.01}


def methods(device: torch.device, names: Sequence[str] = ()) -> dict[str, Method]:
    """Those that this machine has, or of these the named ones, by name; the published first.

    Raises:
        ConfigError: this machine has none of a name.
    """
    found = {}
    if published_missing() is None:
        found["published"] = Method(partial(_by_layer, _published), ENDS, True, _SINGLE)
    found["ours"] = Method(ours, ENDS, False, _EXACT)
    found["svd_lowrank"] = Method(partial(_by_layer, _lowrank), ("largest",), False, _SINGLE)
    for driver in _DRIVERS if device.type == "cuda" else ():
        with contextlib.suppress(RuntimeError):
            torch.linalg.svd(torch.eye(2, device=device), driver=driver)
            found[driver] = Method(partial(_by_layer, partial(_full, driver)), ENDS, True, _EXACT)
    for name in names:
        if name not in found:
            raise ConfigError(f"there is no method {name!r} here: give some of {list(found)}")
    return {name: method for name, method in found.items() if not names or name in names}


def published_missing() -> str | None:
    """Why PEFT's procedure cannot run here: it imports attrs, which PEFT does not depend on."""
    try:
        importlib.import_module("peft.tuners.lora.corda")
    except ImportError as error:
        return str(error)
    return None


def ours(case: Case, ends: Iterable[End]) -> Parts:
    """By `co_svd_layers`."""
    layers = partial(co_svd_layers, case.weights, case.covariances, rank=case.rank, damping=DAMPING)
    return {which: {name: Part(one.U) for name, one in layers(which=which)} for which in ends}


def _by_layer(
    decompose: Callable[[Tensor, Tensor, dict[End, slice]], dict[End, Part]],
    case: Case,
    ends: Iterable[End],
) -> Parts:
    """Layer by layer; `decompose` takes W, C and the components wanted, by end."""
    every: dict[End, slice] = {"largest": slice(case.rank), "smallest": slice(-case.rank, None)}
    wanted = {which: every[which] for which in ends}
    parts: Parts = {which: {} for which in wanted}
    for name, W in case.weights.items():
        for which, part in decompose(W, case.covariances[name], wanted).items():
            parts[which][name] = part
    return parts


def _published(W: Tensor, C: Tensor, wanted: dict[End, slice]) -> dict[End, Part]:
    """PEFT's own: the inverse of C and a full SVD of W·C, in float32."""
    from peft.tuners.lora.corda import collect_eigens_for_layer

    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    linear.covariance_matrix = C
    eigens = collect_eigens_for_layer(linear, None)
    S = eigens.S_WC.cpu()[:, None]
    return {
        which: Part(eigens.U_WC[:, chosen].clone(), S[chosen] * eigens.V_WC[:, chosen].mT)
        for which, chosen in wanted.items()
    }


def _lowrank(W: Tensor, C: Tensor, wanted: dict[End, slice]) -> dict[End, Part]:
    """torch.svd_lowrank of W·C, in float32, with half as many vectors again and its two rounds."""
    M = W @ _damped(C)
    rank = wanted["largest"].stop
    U = torch.svd_lowrank(M, min(rank + rank // 2, *M.shape))[0][:, :rank]
    return {"largest": Part(U)}


def _full(driver: str, W: Tensor, C: Tensor, wanted: dict[End, slice]) -> dict[End, Part]:
    """One of cuSOLVER's drivers on W·C in float64."""
    M = W.double() @ _damped(C.double())
    U, _, _ = torch.linalg.svd(M, full_matrices=False, driver=driver)
    return {which: Part(U[:, chosen].clone()) for which, chosen in wanted.items()}


def _damped(C: Tensor) -> Tensor:
    diagonal = C.diagonal()
    return C + torch.diag((DAMPING * diagonal.mean()).expand(diagonal.shape))
