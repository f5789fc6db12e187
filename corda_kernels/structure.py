"""What a model says of itself: its parts, what its forward takes, its sizes and its task."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_args

import torch
from torch import nn

from corda_kernels.errors import ModelError
from corda_kernels.linears import is_linear

_POSITIONS = re.compile(r"wpe|position")
# Torch's wrappers of whole models, by name since importing them takes seconds, and where they keep
# the model.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}
# PEFT's task by the end of a class's name, for what it calls with token ids.
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
# Heads that are made for each task anew, by the ends of transformers' names, as PEFT takes them.
TASK_HEADS = ("classifier", "score", "classification_head", "qa_outputs")


def decoder(model: nn.Module) -> nn.Module:
    """The model without its output head, so that no logits are computed; else the model itself.

    transformers keeps it as `base_model` (Llama, Qwen, Mistral, Gemma, GPT-2 and others were
    tried).
    """
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


def arguments(model: nn.Module) -> dict[str, None]:
    """The names of what a model's forward takes, in its order; {} where it takes any.

    Of its `**kwargs` those count that a TypedDict describes, as transformers' do.
    """
    names: dict[str, None] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            for described in get_args(parameter.annotation):
                names |= dict.fromkeys(getattr(described, "__annotations__", ()))
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            names[name] = None
    return names


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has a decoder that reads an encoder's states."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def text_config(model: nn.Module) -> Any:
    """The config of the language model within a transformers model; None for other models."""
    return _part(getattr(model, "config", None), "get_text_config")


def language_model(model: nn.Module) -> nn.Module:
    """The part of a vision– or audio–language model that writes the text; else the model itself."""
    apart = text_config(model) is not getattr(model, "config", None)
    apart = apart and not is_encoder_decoder(model)
    found = _part(model, "get_decoder") if apart and _generates(model) else None
    return found if isinstance(found, nn.Module) else model


def _generates(model: nn.Module) -> bool:
    return hasattr(model, "prepare_inputs_for_generation")


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that make up the decoder, by name in their order.

    They are the members of the list that holds the most linear layers.

    Raises:
        ModelError: there is no such list.
    """
    lists = [
        (sum(is_linear(module) for module in blocks.modules()), name, blocks)
        for name, blocks in language_model(model).named_modules()
        if isinstance(blocks, nn.ModuleList)
    ]
    count, _, found = max(lists, default=(0, "", None), key=lambda entry: entry[0])
    if not count or found is None:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks: calibrate it in one pass"
        )
    names = {module: name for name, module in model.named_modules()}
    return {names[block]: block for block in found}


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs; for one whose weights are offloaded, where it computes."""
    hook = getattr(_part(model, "get_input_embeddings"), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def devices(model: nn.Module) -> set[torch.device]:
    """Where a model computes: the devices that hold its weights or take its inputs."""
    found = {parameter.device for parameter in model.parameters()}
    return found | {input_device(model)} if found else found


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids have an embedding; None where the model does not say."""
    count = getattr(_part(model, "get_input_embeddings"), "num_embeddings", None)
    return count if isinstance(count, int) else None


def position_count(model: nn.Module) -> int | None:
    """How many tokens a sequence may have at most; None where no table of positions bounds it.

    Positions that are computed, as rotary ones mostly are, have no bound. Learned ones (GPT-2,
    OPT) and precomputed ones (GPT-J) are looked up.
    """
    text = text_config(model)
    tables = {name: len(buffer) for name, buffer in model.named_buffers() if buffer.ndim > 1}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            # OPT has two rows before that of the first position.
            tables[name] = module.num_embeddings - getattr(module, "offset", 0)
    looked_up = {size for name, size in tables.items() if _POSITIONS.search(name)}
    asked = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    return next((count for count in asked if count in looked_up), None)


def trained_positions(model: nn.Module) -> int | None:
    """How many tokens at a time the model was trained on; None if its config does not say."""
    count = getattr(text_config(model), "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


def padding_multiple(model: nn.Module) -> int:
    """What a model pads every sequence to a multiple of by itself, such as Longformer's window; 1
    where it pads none."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "_pad_to_window_size"):
            windows = config.attention_window  # type: ignore[union-attr]
            return int(windows if isinstance(windows, int) else max(windows))
        sparse = getattr(module, "attention_type", "block_sparse") == "block_sparse"
        if hasattr(module, "_pad_to_block_size") and sparse:
            return int(config.block_size)  # type: ignore[union-attr]
    return 1


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that computes the logits, if the model says which it is; of speech models for CTC,
    which do not, their `lm_head`."""
    head = _part(model, "get_output_embeddings") or getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Module) else None


def classification_heads(model: nn.Module) -> list[str]:
    """The heads of a transformers model that are made for a task anew, and so are trained whole."""
    parts = model.named_children() if hasattr(model, "config") else ()
    return [name for name, part in parts if name.endswith(TASK_HEADS) and list(part.parameters())]


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what a model does, by which it chooses how to call it; None for its plain
    class, which calls any model."""
    name = type(model).__name__
    if not {"input_ids", "inputs_embeds"} <= arguments(model).keys():
        return None
    if _generates(model):
        return "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    return next((task for end, task in _TASK_TYPES.items() if name.endswith(end)), None)


def _part(owner: object, find: str) -> object:
    """What a method of this name gives; None where there is no such method, or none for this."""
    method = getattr(owner, find, None)
    try:
        return method() if callable(method) else None
    except NotImplementedError:  # as of two embeddings, which CLIP has
        return None


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules whose weights FSDP2 has sharded over ranks, by its class's name as above."""
    return [
        module
        for module in model.modules()
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model over ranks, all of which have to run together.

    Raises:
        ModelError: it is sharded in another way.
    """
    found = bool(fsdp_modules(model))
    for name, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", ())
        if len(placements) and (not found or sum(not p.is_replicate() for p in placements) > 1):
            raise ModelError(
                f"{name} is sharded by other means than FSDP2 alone, such as tensor parallelism, "
                "where no rank sees whole inputs: load the model without a tp_plan"
            )
    return found


def check_unwrapped(model: nn.Module) -> None:
    """Refuses a model inside torch.compile's or a parallel wrapper.

    An adapter made there would be of layers under the wrapper's names, and no tool would find them.

    Raises:
        ModelError: it is wrapped.
    """
    for kind in type(model).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
            raise ModelError(
                f"the model is wrapped in {kind.__name__}: initialise the model inside "
                f"(model.{_WRAPPERS[kind.__name__]}) first, and wrap what that returns"
            )
