"""Fused experts during calibration: what each of them reads.

A fused experts module calls no layer for each expert, so that hooks see nothing of what happens in
it. transformers lets its experts functions be exchanged: while sums are taken, one of this module's
stands in for them, computes the same expert by expert, and passes on what each projection reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

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

    def note(module: nn.Module, attribute: str, expert: int | None, x: Tensor, *more: Any) -> None:
        name = names.get(module, {}).get((attribute, expert))
        if name is not None and len(x):
            # As in a hook: sums made under the caller's inference mode could not be changed.
            with torch.inference_mode(False), torch.no_grad():
                read(name, x, *more)

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
        if getattr(module, "has_post_expert_norm", False):  # from transformers 5.20 on
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
