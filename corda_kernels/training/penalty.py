"""Penalties that hold an adapter, while it trains, to what its calibration text asks of the model.

Both are sums over layers of a few products of the adapter's factors with the covariance C of the
layer's inputs. Only the trained factors get gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from corda_kernels.adapter import (
    AdapterFactors,
    CordaLinear,
    LayerAdapter,
    LiveAdapter,
    live_adapter,
)
from corda_kernels.arguments import instance_of
from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import AdapterError, ConfigError, CovarianceError
from corda_kernels.linalg import co_svd_layers
from corda_kernels.linears import LinearWeights
from corda_kernels.precision import without_autocast

_Frozen = TypeVar("_Frozen")


def drift_penalty(model: nn.Module, covariances: CovarianceSet) -> Tensor:
    """The present value of `DriftPenalty`; a training loop makes one of these and calls it.

    Args:
        model: see `DriftPenalty`.
        covariances: see `DriftPenalty`.

    Raises:
        CordaError: see `DriftPenalty`.
    """
    return DriftPenalty(model, covariances)()


def compactness_penalty(model: nn.Module, covariances: CovarianceSet) -> Tensor:
    """The present value of `CompactnessPenalty`; a training loop makes one of these and calls it.

    Args:
        model: see `CompactnessPenalty`.
        covariances: see `CompactnessPenalty`.

    Raises:
        CordaError: see `CompactnessPenalty`.
    """
    return CompactnessPenalty(model, covariances)()


class DriftPenalty:
    """How far training has moved the layers' outputs on the calibration text.

        Σ tr(ΔW C ΔWᵀ),   ΔW = s·B A

    over the adapted layers (beside a residual ΔW = s·(B A − B0 A0)). With C = E[x xᵀ] each term is
    E‖ΔW x‖²: the mean over the tokens of the calibration of the squared change of that layer's
    output, in the squared unit of its activations. It is not divided by anything. Value and
    gradient are 0 at the start.

    ΔW is never formed, and is no difference of two large products, see `LayerAdapter.change`. The
    layers that read one input share one product with C.

    Attributes:
        layers: names of the layers that are summed over.
    """

    @without_autocast()
    def __init__(self, model: nn.Module, covariances: CovarianceSet) -> None:
        """Finds the adapter's factors and takes each C to the device of its layers.

        Args:
            model: from `init_corda` or `load_for_training`, with PEFT or without, or a PeftModel
                with a plain LoRA; on its device already.
            covariances: of the text on which outputs are to be kept, for all adapted layers.

        Raises:
            AdapterError: the model carries no adapter, or one of another kind.
            CovarianceError: a layer has no covariance, or one of another size.
            ModelError: what is given is no model.
        """
        inputs = _shared_inputs(live_adapter(model), covariances)
        self.layers = tuple(name for shared in inputs for name in shared.layers)
        self._inputs = [(shared, None) for shared in inputs]

    @without_autocast()
    def __call__(self) -> Tensor:
        """The penalty, a scalar of the factors' dtype, at least float32."""
        return _sum(_drift, self._inputs)


class CompactnessPenalty:
    """How much of each layer's spectrum a KPM adapter takes up, in CorDA++'s measure of it.

        Σ ‖s·B A C‖_* / σmax(WC)  ≤  Σ s/σmax(WC) · ½ Σᵢ (dᵢ‖Bᵢ‖² + ‖AᵢC‖²/dᵢ)

    over the adapted layers and their components i, of which the right side is computed. The nuclear
    over the spectral norm is what the adapter holds of the effective rank in `compactness`; log
    π(C), a constant of the layer, is left out. Any dᵢ > 0 bounds it; dᵢ = ‖A0ᵢC‖/‖B0ᵢ‖ is exact at
    the start, where the products of A's rows with C, and B's columns, are orthogonal. dᵢ and
    σmax(WC) stay as they are at the start, and C is damped as it was in the decomposition. No unit.

    It pulls towards B A = 0, not towards the start, where its gradient is not 0.

    Attributes:
        layers: names of the layers that are summed over.

    Source: the score of CorDA++; its bound by squared norms of factors is an addition.
    """

    @without_autocast()
    def __init__(self, model: nn.Module, covariances: CovarianceSet) -> None:
        """Finds the adapter's factors and computes σmax(WC), which takes seconds.

        Args:
            model: a KPM model with `residual="weight"`, from `init_corda` or `load_for_training`,
                with PEFT or without; on its device already.
            covariances: those that its adapter was made of.

        Raises:
            ConfigError: the adapter is an IPM one.
            AdapterError: the model carries no adapter in the published form.
            CovarianceError: a layer has no covariance, or one of another size.
            ModelError: what is given is no model.
        """
        live = live_adapter(model)
        if live.record is None or live.record.residual is None:
            raise AdapterError(
                "the compactness penalty is about components that stand in A and B themselves, "
                'those of the published form: make the adapter with residual="weight", or use '
                "drift_penalty"
            )
        if live.record.mode == "ipm":
            raise ConfigError(
                "the compactness penalty says nothing in IPM, where the adapter holds the largest "
                "components itself, so that what it bounds never exceeds its start: use "
                "drift_penalty"
            )
        inputs = _shared_inputs(live, covariances)
        self.layers = tuple(name for shared in inputs for name in shared.layers)
        largest = _largest_singular_values(live, covariances)
        self._inputs = []
        for shared in inputs:
            damped = shared.damped(live.record.damping or 0.0)
            initial = {name: _initial(layer) for name, layer in damped.layers.items()}
            images = damped.times([factors.A.double() for factors in initial.values()])
            bounds = [
                _bound(factors, image, largest[name])
                for (name, factors), image in zip(initial.items(), images, strict=True)
            ]
            self._inputs.append((damped, bounds))

    @without_autocast()
    def __call__(self) -> Tensor:
        """The penalty, a scalar of the factors' dtype, at least float32."""
        return _sum(_compactness, self._inputs)


@dataclass(frozen=True, eq=False)
class _SharedInput:
    """One covariance and the adapted layers that read this input, by name.

    Attributes:
        C: (in, in), on the layers' device, of the dtype to compute in.
        damping: λ to be added to C.
        layers: A and B are parameters.
    """

    C: Tensor
    damping: float
    layers: dict[str, LayerAdapter]

    def damped(self, share: float) -> _SharedInput:
        """The same with C damped by `share` times its mean diagonal."""
        return _SharedInput(self.C, share * float(self.C.diagonal().double().mean()), self.layers)

    def factors(self) -> list[LayerAdapter]:
        """The layers' factors in the dtype to compute in."""
        return [layer.to(self.C.dtype) for layer in self.layers.values()]

    def times(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Each of `rows` (rank, in) times C + λI, all by one product."""
        stacked = torch.cat(list(rows))
        image = stacked @ self.C.to(stacked)
        if self.damping:
            image = image + self.damping * stacked
        return list(image.split_with_sizes([len(block) for block in rows]))


def _shared_inputs(live: LiveAdapter, covariances: CovarianceSet) -> list[_SharedInput]:
    """The adapted layers by the covariance, device and dtype that they share.

    Raises:
        CovarianceError: a layer has no covariance, or one of another size.
    """
    instance_of("covariances", covariances, CovarianceSet, CovarianceError)
    missing = [name for name in live.layers if name not in covariances]
    if missing:
        raise CovarianceError(
            f"there is no covariance for the adapted layer {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: calibrate the base of this "
            "model, with targets that include all adapted layers"
        )
    inputs: dict[tuple[int, torch.device, torch.dtype], _SharedInput] = {}
    for name, layer in live.layers.items():
        C = covariances[name].matrix
        if C.shape[0] != layer.A.shape[1]:
            raise CovarianceError(
                f"layer {name} has {layer.A.shape[1]} inputs, but its covariance {C.shape[0]} "
                "channels: the covariances were taken from another model"
            )
        device, dtype = layer.A.device, torch.promote_types(layer.A.dtype, torch.float32)
        key = (id(C), device, dtype)
        if key not in inputs:
            inputs[key] = _SharedInput(C.detach().to(device, dtype), 0.0, {})
        inputs[key].layers[name] = layer
    return list(inputs.values())


def _drift(shared: _SharedInput, _: None) -> Tensor:
    """Σ tr(ΔW C ΔWᵀ) of the layers that read one input."""
    changes = [layer.change() for layer in shared.factors()]
    images = shared.times([change.A for change in changes])
    total = shared.C.new_zeros(())
    for change, image in zip(changes, images, strict=True):
        gram = change.B.mT @ change.B
        total = total + change.scaling**2 * (gram * (image @ change.A.mT)).sum()
    return total


@dataclass(frozen=True, eq=False)
class _Bound:
    """What stays as it is in the bound on one layer's compactness.

    Attributes:
        d: (rank,), how each component's bound is shared out between its row and its column.
        weight: s/σmax(WC).
    """

    d: Tensor
    weight: float


@torch.no_grad()
def _bound(initial: AdapterFactors, image: Tensor, largest: float) -> _Bound:
    """The bound that is exact at the start, where `image` is A0 C."""
    d = image.norm(dim=1) / initial.B.double().norm(dim=0)
    live = (d > 0) & d.isfinite()
    # A component that C or W does not see takes part like the layer's others.
    stand_in = d[live].median() if bool(live.any()) else d.new_tensor(1.0)
    d = torch.where(live, d, stand_in)
    # A layer whose W or inputs vanish has no spectrum to take up.
    return _Bound(d, initial.scaling / largest if largest > 0 else 0.0)


def _compactness(shared: _SharedInput, bounds: Sequence[_Bound]) -> Tensor:
    """Σ s/(2σmax)·Σᵢ (dᵢ‖Bᵢ‖² + ‖AᵢC‖²/dᵢ) of the layers that read one input."""
    layers = shared.factors()
    images = shared.times([layer.A for layer in layers])
    total = shared.C.new_zeros(())
    for layer, image, bound in zip(layers, images, bounds, strict=True):
        d = bound.d.to(shared.C.dtype)
        parts = d * layer.B.square().sum(0) + image.square().sum(1) / d
        total = total + bound.weight / 2 * parts.sum()
    return total


def _initial(layer: LayerAdapter) -> AdapterFactors:
    """A0 and B0 where A and B are."""
    if layer.initial is None:
        raise AdapterError("the model has lost what its adapter started from: load it again")
    return layer.initial.to(layer.A.device)


def _largest_singular_values(live: LiveAdapter, covariances: CovarianceSet) -> dict[str, float]:
    """σmax(WC) of the adapted layers, C damped as in their decomposition, W without adapter."""
    found = co_svd_layers(
        _WholeWeights(live),
        {name: covariances[name].matrix for name in live.layers},
        rank=1,
        which="largest",
        damping=live.record.damping if live.record is not None else None,
    )
    return {name: float(part.S[0]) for name, part in found}


class _WholeWeights(LinearWeights):
    """Weights with the part that their adapter has taken over, (out, in), at least float32."""

    def __init__(self, live: LiveAdapter) -> None:
        modules: dict[str, Any] = live.modules
        super().__init__(
            {
                name: module.base if isinstance(module, CordaLinear) else module.get_base_layer()
                for name, module in modules.items()
            }
        )
        self._layers = live.layers

    def __getitem__(self, name: str) -> Tensor:
        residual = super().__getitem__(name)
        return residual + _initial(self._layers[name]).product().to(residual.device)


def _sum(
    term: Callable[[_SharedInput, _Frozen], Tensor],
    inputs: Sequence[tuple[_SharedInput, _Frozen]],
) -> Tensor:
    """The sum of `term` over all inputs, in full precision even where autocast is on."""
    first = inputs[0][0].C.device
    terms = []
    for shared, frozen in inputs:
        with torch.autocast(shared.C.device.type, enabled=False):
            terms.append(term(shared, frozen).to(first))
    return torch.stack(terms).sum()
