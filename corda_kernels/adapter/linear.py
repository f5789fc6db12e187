"""The adapter without PEFT: a linear layer that carries its own low-rank part."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from corda_kernels.adapter.factors import AdapterFactors, check_factors
from corda_kernels.arguments import instance_of
from corda_kernels.errors import AdapterError, TargetError
from corda_kernels.linears import is_linear, linear_shape


class CordaLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank part, y = base(x) + s·B A x.

    Attributes:
        base: the wrapped nn.Linear or Conv1D, frozen.
        A: (rows, in) parameter; see `adapter_factors`.
        B: (out, rows) parameter.
        scaling: s.

    Raises:
        TargetError: the base is no linear layer.
        AdapterError: the factors are none, or of another layer's size.
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
        """x (..., in) → (..., out), in the dtype that the base gives."""
        y: Tensor = self.base(x)
        low = functional.linear(functional.linear(x.to(self.A.dtype), self.A), self.B)
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


def detach_linears(model: nn.Module) -> nn.Module:
    """Puts the wrapped layers back, in place; the adapter is gone afterwards."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CordaLinear):
            model.set_submodule(name, module.base)
    return model
