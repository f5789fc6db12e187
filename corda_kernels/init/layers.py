"""Covariances and ranks in, the adapter of each layer out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.adapter import (
    AdapterFactors,
    LayerAdapter,
    adapter_factors,
    published_factors,
)
from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import OutOfMemoryWarning, warn
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.measured import sampled_spectrum
from corda_kernels.linalg import CoSVD, co_svd_layers
from corda_kernels.linears import is_quantised, linear_shape, linear_weight, weights_at_hand
from corda_kernels.progress import progress_bar

# Of weights in float32 that are held in memory for their decomposition.
_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class MadeLayer:
    """One layer's adapter, what to note of it, and its part of the spectrum, both as JSON."""

    adapter: LayerAdapter
    note: dict[str, Any]
    spectrum: dict[str, Any]

    def to(self, device: torch.device) -> MadeLayer:
        """The same, with the factors on a device."""
        return replace(self, adapter=self.adapter.to(device))


def layer_adapters(
    modules: Mapping[str, nn.Module],
    covariances: CovarianceSet,
    ranks: Mapping[str, int],
    config: CordaConfig,
    *,
    progress: bool,
) -> dict[str, MadeLayer]:
    """The adapter of every module, in the order in which they come.

    Raises:
        DecompositionError: a covariance is not finite.
    """
    made: dict[str, MadeLayer] = {}
    bar = progress_bar(description="decomposing", unit="layers", shown=progress, total=len(modules))
    with bar:
        for together in _loaded_together(modules, covariances):
            with contextlib.ExitStack() as stack:
                for name in together:
                    stack.enter_context(weights_at_hand(modules[name]))
                weights = {name: linear_weight(modules[name]).detach() for name in together}
                matrices = {name: covariances[name].matrix for name in together}
                for name, part, layer in _decomposed(weights, matrices, ranks, config):
                    note = {
                        "rank": ranks[name],
                        "tokens": covariances[name].tokens,
                        "sigma_max": float(part.S[0]),
                        "sigma_min": float(part.S[-1]),
                        "residual": float(part.residual),
                    }
                    whole = min(weights[name].shape)
                    first = 0 if config.which == "largest" else whole - ranks[name]
                    spectrum = sampled_spectrum(part.S, first, whole)
                    made[name] = MadeLayer(layer, note, spectrum)
                    bar.update()
    return made


def _loaded_together(
    modules: Mapping[str, nn.Module], covariances: CovarianceSet
) -> Iterator[list[str]]:
    """All layers whose weights are in memory, then offloaded and quantised ones, those of as many
    inputs at a time as may be unpacked."""
    apart = {
        name for name, module in modules.items() if module.weight.is_meta or is_quantised(module)
    }
    present = [name for name in modules if name not in apart]
    if present:
        yield present
    together: list[str] = []
    size = 0
    for _, names in covariances.groups():
        names = [name for name in names if name in apart]
        more = sum(4 * math.prod(linear_shape(modules[name])) for name in names)
        if together and size + more > _UNPACKED_BYTES:
            yield together
            together, size = [], 0
        together += names
        size += more
    if together:
        yield together


def _decomposed(
    weights: Mapping[str, Tensor],
    matrices: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    config: CordaConfig,
) -> Iterator[tuple[str, CoSVD, LayerAdapter]]:
    """The decomposition and adapter of each layer, on the CPU where a device's memory runs out."""

    def found(of: Mapping[str, Tensor]) -> Iterator[tuple[str, CoSVD, LayerAdapter]]:
        for name, part in co_svd_layers(
            of,
            {name: matrices[name] for name in of},
            rank=ranks,
            which=config.which,
            method=config.method,
            damping=config.damping,
            seed=config.seed,
        ):
            yield name, part, _fresh(of[name], part, config)

    left = dict(weights)
    try:
        for entry in found(weights):
            del left[entry[0]]
            yield entry
    except torch.OutOfMemoryError:
        pass  # what is left goes one by one, which takes less
    for name, weight in left.items():
        try:
            yield from found({name: weight})
        except torch.OutOfMemoryError:
            warn(
                f"{weight.device} has too little memory to decompose layer {name}: the CPU takes "
                "over",
                OutOfMemoryWarning,
            )
            yield from found({name: weight.cpu()})


def _fresh(weight: Tensor, part: CoSVD, config: CordaConfig) -> LayerAdapter:
    """The untrained adapter of one layer, in float32."""
    if config.residual is None:
        return LayerAdapter(_kept(adapter_factors(weight, part, hold=config.hold)))
    start = _kept(published_factors(weight, part))
    # The trained factors are tensors of their own, for training changes them in place.
    return LayerAdapter(start.to(torch.float32, copy=True), start)


def _kept(factors: AdapterFactors) -> AdapterFactors:
    A, B = factors.A.float().contiguous(), factors.B.float().contiguous()
    return AdapterFactors(A, B, factors.scaling)
