"""The adapter without PEFT: a linear layer that carries its own low-rank part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from corda_kernels.adapter.factors import AdapterFactors, check_factors
from corda_kernels.arguments import instance_of
from corda_kernels.errors import AdapterError, TargetError
from corda_kernels.linears import AdaptedLayer, is_linear, linear_shape


def low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B A x (..., out) of rows x (..., in), in the factors' dtype."""
    return functional.linear(functional.linear(x.to(A.dtype), A), B)


class CordaLinear(AdaptedLayer):
    """A frozen linear layer plus a trainable low-rank part, y = base(x) + s·B A x.

    Attributes:
        base: the wrapped nn.Linear or Conv1D, frozen.
        A: (rows, in) parameter; see `adapter_factors`.
        B: (out, rows) parameter.
        scaling: s.

    Raises:
        TargetError: the base is no linear layer.
        AdapterError: the factors are not factors, or do not have the layer's size.
    """

    def __init__(self, base: nn.Module, factors: AdapterFactors, *, copy: bool = True) -> None:
        super().__init__()
        instance_of("the base", base, nn.Module, TargetError)
        if not is_linear(base):
            raise TargetError(f"a {type(base).__name__} is no linear layer, and takes no adapter")
        check_factors(factors, linear_shape(base), AdapterError)
        self.base = base.requires_grad_(False)
        device = next(base.parameters()).device
        self.A = nn.Parameter(factors.A.to(device, copy=copy))
        self.B = nn.Parameter(factors.B.to(device, copy=copy))
        self.scaling = factors.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out), in the dtype of the base's output."""
        y: Tensor = self.base(x)
        return (y + self.scaling * low_rank(x, self.A, self.B)).to(y.dtype)

    def __getattr__(self, name: str) -> Any:
        """The base's own, for models read some of their layers, as T5 the dtype of a weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def base_layer(module: Any) -> Any:
    """The layer that an adapter's layer wraps, CordaLinear or PEFT's."""
    return module.base if isinstance(module, CordaLinear) else module.get_base_layer()
