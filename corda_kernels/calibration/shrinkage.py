"""Covariances and gradients of few tokens: an expert's are drawn towards the mean of its layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from corda_kernels.calibration.covariance import Covariance, Gradient
from corda_kernels.calibration.experts import ExpertInput, Reader
from corda_kernels.errors import CordaWarning, warn


def _by_layer(inputs: Mapping[str, Reader]) -> list[list[str]]:
    """The names of experts' own inputs, those of one parameter together."""
    layers: dict[tuple[nn.Module, str], list[str]] = {}
    for name, entry in inputs.items():
        if isinstance(entry, ExpertInput) and entry.expert is not None:
            key = entry.parameter.module, entry.parameter.attribute
            layers.setdefault(key, []).append(name)
    return list(layers.values())


def shrunk(
    covariances: Mapping[str, Covariance], inputs: Mapping[str, Reader]
) -> dict[str, Covariance]:
    """Draws each expert's covariance towards the mean of its layer, in place.

    C̃ₑ = (nₑ Cₑ + n₀ C̄)/(nₑ + n₀), with nₑ the expert's tokens and C̄ = Σ nₑ Cₑ / Σ nₑ. An expert
    without tokens has C̄, of 0 tokens. n₀ = (tr C̄)²/‖C̄‖²_F, the effective rank of C̄: of so many
    tokens the sampling error of a covariance is about as large as the covariance itself.

    Args:
        covariances: of the inputs that any token has reached.
        inputs: in the order of the result; those of no expert are left as they are.

    Returns:
        Those of all inputs but of layers that no token has reached.

    Source: shrinkage of covariances, Ledoit and Wolf, A well-conditioned estimator for
        large-dimensional covariance matrices, 2004.
    """
    found = dict(covariances)
    for names in _by_layer(inputs):
        seen = [covariances[name] for name in names if name in covariances]
        if not seen:
            continue
        total = sum(part.tokens for part in seen)
        mean = torch.zeros_like(seen[0].matrix)
        for part in seen:
            mean.add_(part.matrix.to(mean.device), alpha=part.tokens / total)
        energy = float(mean.norm().double().square())
        weight = float(mean.diagonal().sum(dtype=torch.float64)) ** 2 / energy if energy else 0.0
        for part in seen:
            share = weight / (part.tokens + weight)
            part.matrix.lerp_(mean.to(part.matrix.device), share)
        absmax, count = map(torch.zeros_like, (seen[0].absmax, seen[0].outlier_count))
        unseen = Covariance(mean, 0, 0, absmax, count, seen[0].outlier_threshold)
        found |= {name: unseen for name in names if name not in covariances}
    return {name: found[name] for name in inputs if name in found}


def shrunk_gradients(
    gradients: Mapping[str, Gradient],
    covariances: Mapping[str, Covariance],
    inputs: Mapping[str, Reader],
) -> dict[str, Gradient]:
    """Draws each expert's gradients towards the mean of its layer, by one token's weight.

    (nₑ Ḡₑ + Ḡ)/(nₑ + 1), with Ḡ = Σ nₑ Ḡₑ / Σ nₑ, the gradient for a change that all experts
    have in common; D alike. Experts' gradients have little else in common, so that no more is drawn
    than what gives directions to an expert of few tokens. One without tokens has the mean.

    Args:
        gradients: of all inputs that any token has reached, means over their tokens.
        covariances: of the inputs, see `shrunk`.
        inputs: see `shrunk`.
    """
    found = dict(gradients)
    for names in _by_layer(inputs):
        seen = [name for name in names if name in gradients and covariances[name].tokens]
        if not seen:
            continue
        total = sum(covariances[name].tokens for name in seen)
        first = gradients[seen[0]].mean
        mean = Gradient.zeros(len(first), first.shape[1], like=first)
        for name in seen:
            for into, part in zip(mean.tensors, gradients[name].tensors, strict=True):
                into.add_(part.to(into.device), alpha=covariances[name].tokens / total)
        for name in seen:
            share = 1 / (covariances[name].tokens + 1)
            found[name] = gradients[name].merge(mean.to(gradients[name].mean.device), share)
        # safetensors writes no tensor twice; of the others a copy is written.
        unseen = (name for name in names if name not in seen)
        found |= {name: replace(mean, mean=mean.mean.clone()) for name in unseen}
    return found


def warn_unseen_experts(covariances: Mapping[str, Covariance]) -> None:
    """Names the experts that no token was routed to, which have the mean of their layer."""
    unseen = [name for name, covariance in covariances.items() if not covariance.tokens]
    if unseen:
        shown = ", ".join([*unseen[:5], "…"] if unseen[5:] else unseen)
        warn(
            f"no token was routed to {len(unseen)} expert projection(s), which have the mean "
            f"covariance of their layer's experts: {shown}; use more text, or text of more kinds",
            CordaWarning,
        )
