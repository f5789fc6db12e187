"""Penalties that hold an adapter, while it trains, to what its calibration text asks of the model.

Both are sums over layers of a few products of the adapter's factors with the covariance C of the
layer's inputs. Only the trained factors get gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corda_kernels.adapter import AdapterFactors, LayerAdapter, live_adapter
from corda_kernels.adapter.factors import MODES
from corda_kernels.adapter.linear import base_layer
from corda_kernels.adapter.model import LiveAdapter
from corda_kernels.arguments import instance_of, one_of
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.gradients import Sides
from corda_kernels.errors import AdapterError, ConfigError, CovarianceError
from corda_kernels.linalg import co_svd_layers
from corda_kernels.linears import LinearWeights
from corda_kernels.precision import without_autocast


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

    def factors(self) -> list[LayerAdapter]:
        """The layers' factors in the dtype to compute in."""
        return [layer.to(self.C.dtype) for layer in self.layers.values()]

    def times(self, rows: Iterable[Tensor]) -> list[Tensor]:
        """Each of `rows` (rank, in) times C + λI, all by one product."""
        blocks = list(rows)
        stacked = torch.cat(blocks)
        image = stacked @ self.C.to(stacked)
        if self.damping:
            image = image + self.damping * stacked
        return list(image.split_with_sizes([len(block) for block in blocks]))


class _Penalty(ABC):
    """A sum over the adapted layers; those that read one input share one product with C."""

    def __init__(self, live: LiveAdapter, covariances: CovarianceSet, damping: float = 0.0) -> None:
        """Takes each C, damped by `damping` times its mean diagonal, to the device of its layers.

        Raises:
            CovarianceError: a layer has no covariance, or one of another size.
        """
        instance_of("covariances", covariances, CovarianceSet, CovarianceError)
        missing = [name for name in live.layers if name not in covariances]
        if missing:
            raise CovarianceError(
                f"there is no covariance for the adapted layer {missing[0]} and {len(missing) - 1} "
                "more: calibrate the base of this model, with targets that include all of them"
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
                C = C.detach().to(device, dtype)
                mean = float(C.diagonal().double().mean())
                inputs[key] = _SharedInput(C, damping * mean, {})
            inputs[key].layers[name] = layer
        self._inputs = list(inputs.values())
        self.layers = tuple(name for shared in self._inputs for name in shared.layers)

    @without_autocast()
    def __call__(self) -> Tensor:
        """The penalty, a scalar of the factors' dtype, at least float32."""
        first = self._inputs[0].C.device
        return torch.stack([self._of(shared).to(first) for shared in self._inputs]).sum()

    @abstractmethod
    def _of(self, shared: _SharedInput) -> Tensor:
        """The part of the layers that read one input."""


class DriftPenalty(_Penalty):
    """How far training has moved the layers' outputs on the calibration text.

        Σ tr(ΔW C ΔWᵀ),   ΔW = s·B A

    over the adapted layers (with `residual="weight"`, ΔW = s·(B A − B0 A0)). With C = E[x xᵀ] each
    term is E‖ΔW x‖², the mean squared change of that layer's outputs over the calibration's tokens,
    in squared units of its activations, with no further normalisation. Value and gradient are 0 at
    the start.

    With `sides="both"` it is Σ ρ tr(D ΔW C ΔWᵀ) instead, where D = E[g gᵀ] of the gradients g at
    the layer's outputs, and ρ = E[‖g‖² ‖x‖²] / (tr D · tr C). A layer's change then counts by its
    effect on the loss. With D from sampled labels, half of the value estimates the mean KL
    divergence from the base, in nats a token (as in K-FAC, which takes layers to act
    independently). ρ gives D ⊗ C the trace of the layer's Fisher matrix; it is far from 1 where few
    tokens have large activations and small gradients.

    ΔW is computed neither as a matrix nor as a difference of two large products. Layers that read
    one input share one product with C.

    Attributes:
        layers: names of the layers in the sum.

    """

    @without_autocast()
    def __init__(
        self, model: nn.Module, covariances: CovarianceSet, *, sides: Sides = "inputs"
    ) -> None:
        """Finds the adapter's factors and takes each C, and D, to the device of its layers.

        Args:
            model: result of `init_corda` or `load_for_training`, with PEFT or without, or a
                PeftModel with a plain LoRA; on its device already.
            covariances: covariances of the text on which outputs should stay, for all adapted
                layers; for `sides="both"` with gradients, see `calibrate`.
            sides: "inputs" for C alone, "both" for C and D.

        Raises:
            AdapterError: the model has no adapter, or one of another kind.
            ConfigError: sides has a value that is not allowed.
            CovarianceError: a layer has no covariance or gradient, or one of another size.
            ModelError: `model` is no module.

        """
        one_of("sides", sides, ("inputs", "both"))
        super().__init__(live_adapter(model), covariances)
        self._outputs: dict[str, Tensor] = {}
        for shared in self._inputs if sides == "both" else ():
            for name, layer in shared.layers.items():
                gradient = covariances.gradients.get(name)
                if gradient is None or len(gradient.matrix) != len(layer.B):
                    raise CovarianceError(
                        f"there is no gradient for the adapted layer {name}, or one of another "
                        'size: calibrate(…, sides="both", labels="sampled") the base of this model'
                    )
                # Of the covariance as it was measured, whose unit D ⊗ C has.
                traces = [m.diagonal().double().sum() for m in (gradient.matrix, shared.C)]
                product = float(traces[0] * traces[1].to(traces[0].device))
                ratio = float(gradient.fisher_trace) / product if product else 0.0
                self._outputs[name] = ratio * gradient.matrix.to(shared.C)

    def _of(self, shared: _SharedInput) -> Tensor:
        changes = [layer.change() for layer in shared.factors()]
        images = shared.times(change.A for change in changes)
        total = shared.C.new_zeros(())
        for name, change, image in zip(shared.layers, changes, images, strict=True):
            D = self._outputs.get(name)
            gram = change.B.mT @ (change.B if D is None else D @ change.B)
            total = total + change.scaling**2 * (gram * (image @ change.A.mT)).sum()
        return total


class CompactnessPenalty(_Penalty):
    """How much of each layer's spectrum a KPM adapter holds, by CorDA++'s score.

        Σ ‖s·B A C‖_* / σmax(WC)  ≤  Σ s/σmax(WC) · ½ Σᵢ (dᵢ‖Bᵢ‖² + ‖AᵢC‖²/dᵢ)

    over the adapted layers and their components i; the right side is computed, and has no unit. The
    left side is the adapter's part of the effective rank in `compactness`, without log π(C), which
    is constant. Any dᵢ > 0 gives a bound; with dᵢ = ‖A0ᵢC‖/‖B0ᵢ‖ it is exact at the start, where
    the rows of A C, and the columns of B, are orthogonal. dᵢ and σmax(WC) keep their initial
    values, and C is damped as in the decomposition.

    The penalty pulls towards B A = 0, not towards the start, where its gradient is not 0.

    Attributes:
        layers: names of the layers in the sum.

    Source: the score of CorDA++; its bound by squared norms of factors is an addition.

    """

    @without_autocast()
    def __init__(self, model: nn.Module, covariances: CovarianceSet) -> None:
        """Finds the adapter's factors and computes σmax(WC), which takes seconds.

        Args:
            model: a KPM model with `residual="weight"`, from `init_corda` or `load_for_training`,
                with PEFT or without; on its device already.
            covariances: covariances that its adapter was made from.


        Raises:
            ConfigError: the adapter's mode is "ipm", or it was made with `sides="both"`.
            AdapterError: the model has no adapter in the published form.
            CovarianceError: a layer has no covariance, or one of another size.
            ModelError: `model` is no module.

        """
        live = live_adapter(model)
        initial = {
            name: layer.initial.to(layer.A.device)
            for name, layer in live.layers.items()
            if layer.initial is not None
        }
        if live.record is None or not initial:
            raise AdapterError(
                "the compactness penalty needs components that A and B hold themselves: make the "
                'adapter with residual="weight", or use DriftPenalty'
            )
        if MODES[live.record.mode].end != "smallest":
            raise ConfigError(
                "the compactness penalty is for the smallest components; in mode "
                f"{live.record.mode} it never exceeds its initial value: use DriftPenalty"
            )
        if live.record.sides == "both":
            raise ConfigError(
                "the compactness penalty bounds the spectrum of W·C, and this adapter holds "
                f'components of {live.record.product}: make it with sides="inputs", or use '
                "DriftPenalty"
            )
        super().__init__(live, covariances, live.record.damping or 0.0)
        largest = {
            name: float(part.S[0])
            for name, part in co_svd_layers(
                _WholeWeights(live, initial),
                {name: covariances[name].matrix for name in live.layers},
                rank=1,
                which="largest",
                damping=live.record.damping,
            )
        }
        self._bounds: dict[str, tuple[Tensor, float]] = {}
        for shared in self._inputs:
            images = shared.times(initial[name].A.double() for name in shared.layers)
            for name, image in zip(shared.layers, images, strict=True):
                self._bounds[name] = _bound(initial[name], image, largest[name])

    def _of(self, shared: _SharedInput) -> Tensor:
        layers = shared.factors()
        images = shared.times(layer.A for layer in layers)
        total = shared.C.new_zeros(())
        for name, layer, image in zip(shared.layers, layers, images, strict=True):
            d, weight = self._bounds[name]
            d = d.to(shared.C.dtype)
            parts = d * layer.B.square().sum(0) + image.square().sum(1) / d
            total = total + weight / 2 * parts.sum()
        return total


@torch.no_grad()
def _bound(initial: AdapterFactors, image: Tensor, largest: float) -> tuple[Tensor, float]:
    """What stays as it is in the bound on one layer's compactness, where `image` is A0 C.

    Returns:
        d (rank,), how each component's bound is shared out between its row and its column, so that
        it is exact at the start; and s/σmax(WC).
    """
    d = image.norm(dim=1) / initial.B.double().norm(dim=0)
    live = (d > 0) & d.isfinite()
    # A component that C or W does not see takes part like the layer's others.
    stand_in = d[live].median() if bool(live.any()) else d.new_tensor(1.0)
    # A layer whose W or inputs vanish has no spectrum to take up.
    return torch.where(live, d, stand_in), initial.scaling / largest if largest > 0 else 0.0


class _WholeWeights(LinearWeights):
    """Weights with the part that their adapter has taken over, (out, in), at least float32."""

    def __init__(self, live: LiveAdapter, initial: dict[str, AdapterFactors]) -> None:
        super().__init__({name: base_layer(module) for name, module in live.modules.items()})
        self._initial = initial

    def __getitem__(self, name: str) -> Tensor:
        residual = super().__getitem__(name)
        return residual + self._initial[name].product().to(residual.device)
