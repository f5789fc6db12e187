"""Covariances and ranks in, the adapter of each layer out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.adapter.factors import LayerAdapter, adapter_factors, task_factors
from corda_kernels.adapter.published import published_factors
from corda_kernels.adapter.record import LayerNote
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.errors import DecompositionError, OutOfMemoryWarning, warn
from corda_kernels.init.config import CordaConfig
from corda_kernels.init.measured import sampled_spectrum
from corda_kernels.linalg import (
    CoSVD,
    co_svd,
    co_svd_layers,
    is_small,
    map_layers,
    steepest_rows,
)
from corda_kernels.linears import is_quantised, linear_shape, linear_weight, weights_at_hand
from corda_kernels.progress import progress_bar

# Of weights in float32 that are held in memory for their decomposition.
_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class MadeLayer:
    """One layer's adapter, what to note of it, and its part of the spectrum, as JSON."""

    adapter: LayerAdapter
    note: LayerNote
    spectrum: dict[str, Any]


def made_layers(
    modules: Mapping[str, nn.Module],
    covariances: CovarianceSet,
    components: Mapping[str, int],
    config: CordaConfig,
    keep: CovarianceSet | None = None,
) -> dict[str, MadeLayer]:
    """The adapter of every module that gets a component, each made by one of the ranks.

    Args:
        modules: the layers.
        covariances: of them, with gradients where the configuration builds on these.
        components: how many each gets.
        config: how.
        keep: in mode "task" the covariances of what is to be kept.

    Raises:
        DecompositionError: a covariance is not finite.
        DistributedError: another rank has ended.
    """
    ranks = Ranks.of(config.distributed)
    share = ranks.share_layers({name: modules[name] for name in modules if components[name]})
    shown = config.progress and ranks.rank == 0
    maker, made = _Maker(covariances, components, config, keep), dict[str, MadeLayer]()
    bar = progress_bar(description="decomposing", unit="layers", shown=shown, total=len(share))
    with bar:
        for together in _loaded_together(share, covariances):
            with contextlib.ExitStack() as stack:
                for name in together:
                    stack.enter_context(weights_at_hand(share[name]))
                weights = {name: linear_weight(share[name]).detach() for name in together}
                for name, layer in maker.made(weights):
                    made[name] = layer
                    bar.update()
    if ranks.size > 1:
        for name, layer in made.items():
            made[name] = replace(layer, adapter=layer.adapter.to(torch.device("cpu")))
    parts = ranks.gather(made, "decompositions")
    return {name: layer for part in parts for name, layer in part.items()}


def _loaded_together(
    modules: Mapping[str, nn.Module], covariances: CovarianceSet
) -> Iterator[list[str]]:
    """All layers whose weights are in memory, then offloaded and quantised ones, those of as many
    inputs at a time as may be unpacked."""
    apart = {
        name for name in modules if modules[name].weight.is_meta or is_quantised(modules[name])
    }
    if present := [name for name in modules if name not in apart]:
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


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes adapters of layers' weights; see `made_layers`."""

    covariances: CovarianceSet
    components: Mapping[str, int]
    config: CordaConfig
    keep: CovarianceSet | None

    def made(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, MadeLayer]]:
        """Each layer's adapter, by the CPU where a device's memory runs out."""
        one = self._task_starts if self.config.mode == "task" else self._adapters
        left = dict(weights)
        with contextlib.suppress(torch.OutOfMemoryError):
            for name, layer in one(weights):
                del left[name]
                yield name, layer
        for name, weight in left.items():  # one by one, which takes less
            try:
                found = dict(one({name: weight}))
            except torch.OutOfMemoryError:
                reason = f"{weight.device} has too little memory to decompose layer {name}"
                warn(f"{reason}: the CPU takes over", OutOfMemoryWarning)
                found = dict(one({name: weight.cpu()}))
            yield from found.items()

    def _adapters(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, MadeLayer]]:
        """Of the components that the mode trains."""
        config = self.config
        for name, part in self._parts(weights):
            weight = weights[name]
            note = LayerNote.of(part.S, self.covariances[name].tokens, part.residual)
            whole = min(weight.shape)
            first = {"largest": 0, "smallest": whole - len(part.S)}[config.which]
            spectrum = {}
            if config.sides == "inputs":
                spectrum = sampled_spectrum(part.S, first, whole)
            if config.residual is None:
                found = adapter_factors(weight, part, hold=config.hold)
            else:
                found = published_factors(weight, part)
            A, B = found.A.float().contiguous(), found.B.float().contiguous()
            adapter = LayerAdapter(A, B, found.scaling)
            if config.residual is not None:  # what is trained are tensors of their own
                adapter = replace(adapter, A=A.clone(), B=B.clone(), initial=adapter)
            yield name, MadeLayer(adapter, note, spectrum)

    def _parts(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, CoSVD]]:
        """The components of W·C, or of D^½ W C^½ where both sides count."""
        config = self.config
        options: dict[str, Any] = {
            "which": config.which,
            "method": config.method,
            "damping": config.damping,
            "seed": config.seed,
        }
        if config.sides == "inputs":
            matrices = {name: self.covariances[name].matrix for name in weights}
            return co_svd_layers(weights, matrices, rank=self.components, **options)

        def both(name: str) -> tuple[str, CoSVD]:
            with _named(name):
                return name, co_svd(
                    weights[name],
                    self.covariances[name].matrix,
                    rank=self.components[name],
                    output_covariance=self.covariances.gradients[name].matrix,
                    power=0.5,
                    **options,
                )

        return map_layers(both, weights, [*map(is_small, weights.values())])

    def _task_starts(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, MadeLayer]]:
        """Of the steepest directions of each layer's gradient."""

        def start(name: str) -> tuple[str, MadeLayer]:
            gradient = self.covariances.gradients[name].mean.to(weights[name].device)
            with _named(name):
                rows, S, residual = steepest_rows(
                    gradient,
                    None if self.keep is None else self.keep[name].matrix,
                    rank=self.components[name],
                    damping=self.config.damping,
                    method=self.config.method,
                    seed=self.config.seed,
                )
            note = LayerNote.of(S, self.covariances[name].tokens, residual)
            found = task_factors(rows, len(gradient)).to(torch.float32)
            return name, MadeLayer(LayerAdapter(found.A, found.B), note, {})

        return map_layers(start, weights, [*map(is_small, weights.values())])


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the layer's name before what a decomposition refuses."""
    try:
        yield
    except DecompositionError as error:
        raise DecompositionError(f"layer {name}: {error}") from error
