"""Fused experts during calibration: what each of them reads, and covariances of few tokens.

A fused experts module calls no layer for each expert, so that hooks see nothing of what happens in
it. transformers lets its experts functions be exchanged: while sums are taken, one of this module's
stands in for them, computes the same expert by expert, and passes on what each projection reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.calibration.covariance import Covariance, Gradient
from corda_kernels.errors import CordaWarning, warn
from corda_kernels.experts import ATTRIBUTES, ExpertParameter, is_decorated
from corda_kernels.linears import linear_shape, weights_at_hand

Experts = Literal["shared", "each"]

# Takes a name, an input (rows, in), the numbers of its rows in the pass, None where it has all, and
# what the projection made of them (rows, out), None of an input that all experts share.
Read = Callable[[str, Tensor, Tensor | None, Tensor | None], None]
# The same with the experts module, the name of a parameter in it, and an expert in place of a name.
Note = Callable[[nn.Module, str, int | None, Tensor, Tensor | None, Tensor | None], None]


@dataclass(frozen=True)
class ExpertInput:
    """What a projection of fused experts reads.

    Attributes:
        parameter: the projection of all experts.
        expert: the number of the one whose tokens these are; None for what all experts share.
    """

    parameter: ExpertParameter
    expert: int | None = None


# What reads an input of which there is a covariance.
Reader = nn.Module | ExpertInput


def reader_shape(reader: Reader) -> tuple[int, int]:
    """(out, in) of the weight that multiplies the input; see `linear_shape`."""
    if isinstance(reader, ExpertInput):
        return reader.parameter.outputs, reader.parameter.inputs
    return linear_shape(reader)


def reader_weight(reader: Reader) -> Tensor:
    """The tensor that holds that weight, for its device and dtype."""
    if isinstance(reader, ExpertInput):
        weight: Tensor = getattr(reader.parameter.module, reader.parameter.attribute)
        return weight
    return reader.weight  # type: ignore[return-value]


def expert_inputs(
    parameters: Mapping[str, ExpertParameter], experts: Experts
) -> dict[str, ExpertInput]:
    """The inputs of fused experts by the names of their covariances.

    One that all experts of a parameter share has the parameter's name, an expert's own that and the
    expert's number, such as "model.layers.0.mlp.experts.down_proj.5".

    Args:
        parameters: by full name.
        experts: "shared" for one covariance of the hidden states that all experts of a layer read,
            "each" for one an expert there too, of the tokens that are routed to it.
    """
    found: dict[str, ExpertInput] = {}
    for name, parameter in parameters.items():
        if parameter.takes_hidden and experts == "shared":
            found[name] = ExpertInput(parameter)
        else:
            each = range(parameter.experts)
            found |= {f"{name}.{expert}": ExpertInput(parameter, expert) for expert in each}
    return found


def by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of experts' own covariances among `names`, by their parameter; see above."""
    found: dict[str, list[str]] = {}
    for name in names:
        parameter, _, number = name.rpartition(".")
        if number.isdecimal() and parameter.rpartition(".")[2] in ATTRIBUTES:
            found.setdefault(parameter, []).append(name)
    return found


@contextlib.contextmanager
def recording(inputs: Mapping[str, ExpertInput], read: Read) -> Iterator[None]:
    """Inside the block experts modules pass on what they read, and compute what they did before.

    Args:
        inputs: by name; what their modules read besides is not passed on.
        read: is given each input's rows, where there are some.
    """
    names: dict[nn.Module, dict[tuple[str, int | None], str]] = {}
    for name, entry in inputs.items():
        key = entry.parameter.attribute, entry.expert
        names.setdefault(entry.parameter.module, {})[key] = name

    def note(
        module: nn.Module,
        attribute: str,
        expert: int | None,
        x: Tensor,
        rows: Tensor | None,
        output: Tensor | None,
    ) -> None:
        name = names.get(module, {}).get((attribute, expert))
        if name is not None and len(x):
            # As in a hook: sums made under the caller's inference mode could not be changed.
            with torch.inference_mode(False), torch.no_grad():
                read(name, x, rows, output)

    with one_by_one(names, note):
        yield


@contextlib.contextmanager
def one_by_one(modules: Iterable[nn.Module], note: Note = lambda *_: None) -> Iterator[None]:
    """Inside the block all experts modules that share a config with these compute by `_computed`,
    and Llama 4's by `_computed_scaled`.

    A run that sums up nothing for once, to go on from a checkpoint, needs that for the same bits.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def forward(
        module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        return _computed(module, hidden_states, top_k_index, top_k_weights, note)

    configs: dict[int, Any] = {id(m.config): m.config for m in modules if is_decorated(m)}
    function = f"corda_kernels.{id(forward)}"  # another run may go on meanwhile
    with contextlib.ExitStack() as restored:
        ALL_EXPERTS_FUNCTIONS[function] = forward
        restored.callback(ALL_EXPERTS_FUNCTIONS.pop, function)
        for config in configs.values():
            # As an entry of a mapping it leaves the configs within this one alone.
            before = {"": config._experts_implementation}
            restored.callback(setattr, config, "_experts_implementation", before)
            config._experts_implementation = {"": function}
        for module in modules:
            if not is_decorated(module):
                stand_in = partial(_computed_scaled, module, note)
                restored.enter_context(replaced_forward(module, stand_in))
        yield


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a module runs by `forward`, also in place of a hook of accelerate's, which
    would load its weights."""
    before = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)


def _computed(
    module: Any,
    hidden: Tensor,  # (tokens, in)
    index: Tensor,  # (tokens, active experts); E and above for none
    weights: Tensor,  # (tokens, active experts)
    note: Note,
) -> Tensor:
    """What transformers' eager experts compute, expert by expert, with notes of their inputs."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    note(module, first, None, hidden, None, None)
    result = torch.zeros_like(hidden)
    for expert in range(len(module.down_proj)):
        rows, places = torch.where(index == expert)
        if not len(rows):
            continue
        x = hidden[rows]
        y = _projected(module, first, expert, x)
        note(module, first, expert, x, rows, y)
        x = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = _projected(module, "down_proj", expert, x)
        note(module, "down_proj", expert, x, rows, y)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * weights[rows, places, None]
        result.index_add_(0, rows, y.to(result.dtype))
    return result


def _projected(module: Any, attribute: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, attribute)[expert]
    bias = getattr(module, f"{attribute}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(x, weight.T if module.is_transposed else weight, bias)


def _computed_scaled(module: Any, note: Note, hidden_states: Tensor) -> Tensor:
    """What Llama 4's experts compute, of the tokens that are routed to each.

    They are given all tokens E times over, (E · tokens, in), multiplied by the router's scores,
    which are zero but for the experts that a token is routed to.
    """
    hidden = hidden_states.view(module.num_experts, -1, hidden_states.shape[-1])
    result = torch.zeros_like(hidden)
    routed = hidden.any(-1)  # (E, tokens)
    note(module, "gate_up_proj", None, hidden[routed], torch.where(routed)[1], None)
    with weights_at_hand(module):
        for expert in range(module.num_experts):
            rows = torch.where(routed[expert])[0]
            x = hidden[expert, rows]
            y = x @ module.gate_up_proj[expert]
            note(module, "gate_up_proj", expert, x, rows, y)
            gate, up = y.chunk(2, -1)
            x = up * module.act_fn(gate)
            y = x @ module.down_proj[expert]
            note(module, "down_proj", expert, x, rows, y)
            result[expert, rows] = y
    return result.view(hidden_states.shape)


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
        unseen = replace(
            seen[0],
            matrix=mean,
            tokens=0,
            calls=0,
            absmax=torch.zeros_like(seen[0].absmax),
            outlier_count=torch.zeros_like(seen[0].outlier_count),
        )
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
        first = gradients[seen[0]]
        mean = Gradient(torch.zeros_like(first.matrix), torch.zeros_like(first.mean))
        for name in seen:
            part = gradients[name].to(mean.mean.device)
            mean.matrix.add_(part.matrix, alpha=covariances[name].tokens / total)
            mean.mean.add_(part.mean, alpha=covariances[name].tokens / total)
        for name in seen:
            share = 1 / (covariances[name].tokens + 1)
            found[name] = gradients[name].merge(mean.to(gradients[name].mean.device), share)
        found |= {name: mean for name in names if name not in seen}
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
