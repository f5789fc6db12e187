"""Fused experts one by one: each as a linear layer, with the covariance of what it reads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from corda_kernels.calibration.covariance import Covariance
from corda_kernels.calibration.covariance_set import CovarianceSet
from corda_kernels.experts import ExpertParameter
from corda_kernels.linears import plain_layer


def expert_names(name: str, parameter: ExpertParameter) -> list[str]:
    """What the experts of the parameter `name` are called, each by itself."""
    return [f"{name}.{expert}" for expert in range(parameter.experts)]


def expert_layer(parameter: ExpertParameter, expert: int) -> nn.Linear:
    """One expert as a linear layer, whose weight (outputs, inputs) is a view of the parameter."""
    return plain_layer(parameter.weight(expert))


def expert_layers(parameters: Mapping[str, ExpertParameter]) -> dict[str, nn.Module]:
    """All experts of all parameters as linear layers by `expert_names`."""
    return {
        each: expert_layer(parameter, expert)
        for name, parameter in parameters.items()
        for expert, each in enumerate(expert_names(name, parameter))
    }


def expert_covariances(
    covariances: CovarianceSet, parameters: Mapping[str, ExpertParameter]
) -> CovarianceSet:
    """The set with a covariance for each expert: its own, or that which all of them share."""
    if not parameters:
        return covariances
    found: dict[str, Covariance] = {}
    for name, covariance in covariances.items():
        for each in expert_names(name, parameters[name]) if name in parameters else [name]:
            found.setdefault(each, covariances.get(each, covariance))
    return CovarianceSet(
        found,
        normalize=covariances.normalize,
        left_out=covariances.left_out,
        provenance=covariances.provenance,
        gradients=covariances.gradients,
    )
