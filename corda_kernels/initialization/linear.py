"""The adapter without PEFT: a linear layer that carries its own low-rank pair."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from corda_kernels.errors import AdapterError
from corda_kernels.initialization.adapter import Adapter, AdapterRecord, LayerAdapter


class CordaLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank part, y = base(x) + s·(B A − B0 A0) x.

    With `residual="weight"` the base already lacks s·B0·A0, and only s·B A x is added.

    Attributes:
        base: the wrapped nn.Linear or Conv1D, frozen.
        A: (rank, in) parameter.
        B: (out, rank) parameter.
        A0: (rank, in) buffer, the initial A.
        B0: (out, rank) buffer, the initial B.
        scaling: s.
        record: of the adapter that the layer is a part of.
    """

    A0: Tensor
    B0: Tensor

    def __init__(
        self, base: nn.Module, layer: LayerAdapter, record: AdapterRecord, *, copy: bool = True
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = next(base.parameters()).device
        self.A = nn.Parameter(layer.A.to(device, copy=copy))
        self.B = nn.Parameter(layer.B.to(device, copy=copy))
        self.register_buffer("A0", layer.A0.to(device, copy=copy))
        self.register_buffer("B0", layer.B0.to(device, copy=copy))
        self.scaling = layer.scaling
        self.record = record

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out), in the dtype that the base gives."""
        y: Tensor = self.base(x)
        narrow = x.to(self.A.dtype)
        low = functional.linear(functional.linear(narrow, self.A), self.B)
        if self.record.residual == "pair":
            low = low - functional.linear(functional.linear(narrow, self.A0), self.B0)
        return (y + self.scaling * low).to(y.dtype)

    # Models read these of their layers, as T5 the dtype of a weight.

    @property
    def weight(self) -> Tensor:
        """The base's, without the adapter's part."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.B.shape[0]

    def layer(self) -> LayerAdapter:
        """The factors as plain data."""
        return self.live().detach()

    def live(self) -> LayerAdapter:
        """The same, but A and B are the parameters themselves."""
        return LayerAdapter(self.A, self.B, self.A0, self.B0, self.scaling)


def attach_linears(model: nn.Module, adapter: Adapter, *, copy: bool = True) -> nn.Module:
    """Replaces the adapter's layers by CordaLinear, in place, and freezes everything else."""
    model.requires_grad_(False)
    for name, layer in adapter.layers.items():
        base = model.get_submodule(name)
        model.set_submodule(name, CordaLinear(base, layer, adapter.record, copy=copy))
    return model


def detach_linears(model: nn.Module) -> nn.Module:
    """Puts the wrapped layers back, in place; the adapter is gone afterwards."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CordaLinear):
            model.set_submodule(name, module.base)
    return model


def adapter_of_linears(model: nn.Module) -> Adapter:
    """The adapter that `attach_linears` put into `model`, with its present factors.

    Raises:
        AdapterError: the model has none.
    """
    adapter = live_adapter_of_linears(model)
    return Adapter({name: layer.detach() for name, layer in adapter.layers.items()}, adapter.record)


def live_adapter_of_linears(model: nn.Module) -> Adapter:
    """As `adapter_of_linears`, but A and B are the parameters themselves.

    Raises:
        AdapterError: see there.
    """
    modules = {
        name: module for name, module in model.named_modules() if isinstance(module, CordaLinear)
    }
    if not modules:
        raise AdapterError(
            "the model carries no adapter of this package: attach one with init_corda or "
            "load_for_training"
        )
    record = next(iter(modules.values())).record
    return Adapter({name: module.live() for name, module in modules.items()}, record)
