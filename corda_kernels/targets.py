"""Which layers of a model are adapted."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from corda_kernels.arguments import instance_of, name_list
from corda_kernels.errors import CordaError, ModelError, TargetError
from corda_kernels.experts import ExpertParameter, expert_parameters
from corda_kernels.linears import is_linear, linear_layers
from corda_kernels.structure import classification_heads, decoder, language_model, output_head

_NOT_ADAPTED = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Linear layers that are never called, by what they are part of: its own code takes their weights.
_MIXER = ("x_proj", "dt_proj", "out_proj")  # of state-space mixers, by kernels for training
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def target_linears(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """The linear layers that `targets` selects, by name, in the model's order.

    Args:
        model: see `target_layers`, as for all else.
        targets: the layers.
        exclude: of them.

    Raises:
        TargetError: see `target_layers`; or `targets` select fused experts alone.
        ModelError: `model` is no module.
    """
    found, _ = target_layers(model, targets, exclude)
    if not found:
        raise no_match("targets", targets, linear_layers(model))
    return found


def target_layers(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    experts: bool = False,
) -> tuple[dict[str, nn.Module], dict[str, ExpertParameter]]:
    """The linear layers and the fused expert parameters that `targets` selects, by name.

    Args:
        model: a transformers model, or any module with linear layers.
        targets: "all-linear" for every linear layer except output and classification heads, layers
            tied to an embedding, and layers whose weights other code reads past an adapter (in
            state-space mixers and in WavLM's attention). None for the same, in a vision–language
            model for its language model alone. Or a list of names of modules and expert parameters,
            or of endings of names (`["q_proj", "experts.down_proj"]`); or a regular expression that
            the whole name must match.
        exclude: names, endings or a regular expression of layers to leave out.
        experts: whether "all-linear" and None include fused experts.

    Returns:
        Linear layers, and expert parameters, in the model's order. One of them may be empty.

    Raises:
        TargetError: `targets` or `exclude`, or one of their endings, match nothing; `exclude`
            leaves nothing; the output head is named although it is tied to the embeddings;
            `experts` is set, but the model has no fused experts, or none is selected; or layers
            hold the integers of GPTQ or AWQ.
        ModelError: `model` is no module.

    """
    instance_of("the model", model, nn.Module, ModelError)
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            raise TargetError(
                f"layer {name} is quantised in a way that cannot be read "
                f"({type(module).__name__}, as of GPTQ or AWQ): load the checkpoint that it was "
                "made from, in a floating dtype or quantised by bitsandbytes or torchao"
            )
    linears, head, fused = linear_layers(model), output_head(model), expert_parameters(model)
    if experts and not fused:
        raise TargetError(
            "the model has no fused experts that can be calibrated: leave experts out, or load it "
            "with unpacked weights (--dtype bfloat16)"
        )
    names = [*linears, *fused]
    if targets in (None, "all-linear"):
        part = model if targets else language_model(model)
        inside = set(part.modules()) - {head}
        for name in [*classification_heads(model), *_taken_bare(model)]:
            inside -= set(model.get_submodule(name).modules())
        tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
        chosen = {
            name
            for name, module in linears.items()
            if module in inside and id(getattr(module, "weight", None)) not in tables
        }
        if experts:
            chosen |= {name for name, each in fused.items() if each.module in inside}
        if not chosen:
            raise no_match("targets", targets or "all-linear", names)
    else:
        check_selection("targets", targets, TargetError)
        chosen = _selected("targets", targets, names)
    if exclude is not None:
        check_selection("exclude", exclude, TargetError)
    if exclude:
        chosen -= _selected("exclude", exclude, names)
        if not chosen:
            raise TargetError(f"exclude {exclude!r} leaves no layer of the targets: exclude fewer")
    if experts and chosen.isdisjoint(fused):
        raise TargetError(
            f"targets {targets!r} select none of the model's fused experts: name them as well, "
            f"such as {next(iter(fused))}, or leave experts out"
        )
    found = {name: module for name, module in linears.items() if name in chosen}
    check_unshared(model, {name: module for name, module in found.items() if module is head})
    return found, {name: parameter for name, parameter in fused.items() if name in chosen}


def check_selection(option: str, given: object, error: type[CordaError]) -> None:
    """Refuses what is neither a regular expression nor a list of names.

    Raises:
        CordaError: of type `error`.
    """
    if not isinstance(given, str):
        name_list(option, given, error)


def _selected(option: str, given: str | Sequence[str], linears: Collection[str]) -> set[str]:
    """The layers that a selection matches; each of its endings must match one."""
    if isinstance(given, str):
        try:
            found = {name for name in linears if re.fullmatch(given, name)}
        except (re.error, OverflowError, RecursionError) as error:
            raise TargetError(f"{given!r} is not a regular expression: {error}") from error
        unmatched = []
    else:
        matched = {
            end: {name for name in linears if f".{name}".endswith(f".{end}")} for end in given
        }
        found = set().union(*matched.values())
        unmatched = [end for end in given if not matched[end]]
    if unmatched or not found:
        raise no_match(option, unmatched or given, linears)
    return found


def no_match(option: str, given: object, linears: Collection[str]) -> TargetError:
    """The error of a selection that matches none of a model's linear layers."""
    endings = sorted({name.rpartition(".")[2] for name in linears})
    return TargetError(
        f"no linear layer matches {option} {given!r}; the model's linear layers end in: "
        f"{', '.join(endings[:20]) or '(it has none)'}"
    )


def check_unshared(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Refuses layers that cannot be adapted alone.

    Raises:
        TargetError: a layer shares its weight with another module, as an output head does that is
            tied to the embeddings, or stands in the model under two names.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for name, module in modules.items():
        others = [owner for owner in owners.get(id(module.weight), []) if owner != name]
        if others:
            raise TargetError(
                f"{name} shares its weight with {others[0]}: adapting it would change both; leave "
                "it out of the targets"
            )


def _taken_bare(model: nn.Module) -> list[str]:
    """The linear layers that are not called, at least in training on a GPU: other code takes their
    weights, as Mamba's kernels do, and torch's function for multi-head attention."""
    found = []
    for name, module in model.named_modules():
        parts: tuple[str, ...] = ()
        if hasattr(module, "A_log") and hasattr(module, "D"):
            parts = _MIXER
        elif isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "WavLMAttention":
            parts = _ATTENTION
        found += [f"{name}.{part}" for part in parts if is_linear(getattr(module, part, module))]
    return found


def unreached_weights(
    model: nn.Module, targets: str | Sequence[str] | None = None
) -> dict[str, str]:
    """Matrices that "all-linear" leaves without an adapter, by name with the reason.

    Such are the experts of Mixtral or Qwen-MoE in transformers 5, one 3-D parameter for all experts
    of a layer, which come first, their routers, and the weights that other code takes past an
    adapter, as kernels of a state-space mixer do. Embeddings, convolutions and the output head are
    left out on purpose and not listed. With `targets` None it is about the language model of a
    vision–language model alone.
    """
    why = "other code than its own takes this weight past an adapter; targets may name it"
    found: dict[str, tuple[int, str]] = {f"{name}.weight": (2, why) for name in _taken_bare(model)}
    inside = set(decoder(model if targets else language_model(model)).modules())
    for prefix, module in model.named_modules():
        if module not in inside or is_linear(module) or isinstance(module, _NOT_ADAPTED):
            continue
        for name, weight in module.named_parameters(prefix, recurse=False):
            if weight.ndim in (2, 3) and min(weight.shape) > 1:  # a class token is 1 × 1 × width
                experts = f"{len(weight)} experts fused in one 3-D parameter"
                kind = experts if weight.ndim == 3 else "a bare 2-D parameter"
                reason = f"{kind} of {type(module).__name__}, not a linear layer"
                found[name] = weight.ndim, reason
    fused_first = sorted(found, key=lambda name: -found[name][0])
    return {name: found[name][1] for name in fused_first}
