"""Fused experts: the routed experts of a mixture as three-dimensional parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

ATTRIBUTES = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertParameter:
    """One projection of all experts of a layer: y = W_e x for a token that is routed to expert e.

    Attributes:
        module: the experts module that holds the parameter.
        attribute: its name there: "gate_up_proj", "up_proj" (experts without a gate) or
            "down_proj".
        experts: E, how many there are.
        outputs: channels of y.
        inputs: channels of x.
        transposed: whether the parameter is stored as (E, inputs, outputs), as gpt-oss and Llama 4
            do, in place of (E, outputs, inputs).
    """

    module: nn.Module
    attribute: str
    experts: int
    outputs: int
    inputs: int
    transposed: bool

    @property
    def takes_hidden(self) -> bool:
        """Whether experts read the layer's hidden states, and not what the experts made of them."""
        return self.attribute != "down_proj"

    def weight(self, expert: int) -> Tensor:
        """W_e (outputs, inputs) of one expert, without gradients: a view of the parameter."""
        weight: Tensor = getattr(self.module, self.attribute)[expert].detach()
        return weight.T if self.transposed else weight


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers dispatches a module's forward to its registered experts functions."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def expert_parameters(model: nn.Module) -> dict[str, ExpertParameter]:
    """The fused expert parameters of a transformers model by full name, in its order.

    Those are the experts that transformers' `use_experts_implementation` decorates, and Llama 4's.
    Packed ones, in eight bits or fewer, are not among them.
    """
    found: dict[str, ExpertParameter] = {}
    for name, module in model.named_modules():
        if is_decorated(module):
            transposed = bool(module.is_transposed)
        elif type(module).__name__ == "Llama4TextExperts":
            transposed = True
        else:
            continue
        for attribute in ATTRIBUTES:
            parameter = getattr(module, attribute, None)
            if (
                isinstance(parameter, Tensor)
                and parameter.ndim == 3
                and parameter.is_floating_point()
                and parameter.itemsize > 1
            ):
                experts, first, second = parameter.shape
                outputs, inputs = (second, first) if transposed else (first, second)
                key = f"{name}.{attribute}" if name else attribute
                found[key] = ExpertParameter(
                    module, attribute, experts, outputs, inputs, transposed
                )
    return found
