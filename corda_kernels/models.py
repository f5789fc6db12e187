"""Models: loading them, running them without their head, and finding their linear layers."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from corda_kernels.arguments import instance_of, name_list, readable_path, shown, usable_device
from corda_kernels.errors import (
    CordaError,
    CordaWarning,
    ModelError,
    OutputError,
    TargetError,
    warn,
)
from corda_kernels.experts import ExpertParameter, expert_parameters
from corda_kernels.linears import is_linear, linear_layers
from corda_kernels.outputs import staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_ADAPTED = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POSITIONS = re.compile(r"wpe|position")
# Torch's wrappers of whole models, by name since importing them takes seconds, and where they keep
# the model.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}
# What a model is loaded for, and transformers' class for that.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "feature-extraction": "AutoModel",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-classification": "AutoModelForImageClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
}
# PEFT's task by the end of a class's name, for what it calls with token ids.
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
# Heads that are made for each task anew, by the ends of transformers' names, as PEFT takes them.
_HEADS = ("classifier", "score", "classification_head", "qa_outputs")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_TOKENIZER = (
    r"(tokenizer(_config)?|vocab|merges|spiece|sentencepiece(\.bpe)?|tekken)\.[\w.]+|\w+\.tiktoken"
)
# What a model's folder is made of: none of it outlives the model.
MODEL_FILES = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    r"|(config|generation_config|special_tokens_map|added_tokens)\.json|chat_template\.\w+"
    rf"|{_TOKENIZER}"
)

StrPath = str | os.PathLike[str]


def load_model(
    source: StrPath,
    *,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a transformers model for inference.

    Args:
        source: a folder, a hub id, or a GGUF file. Weights that transformers can dequantise as it
            loads them (GGUF, compressed-tensors, fine-grained FP8, MXFP4) are floating numbers
            then; those of bitsandbytes and torchao stay as they are.
        task: what for, one of `TASKS`; None for the class that its config names. A classification
            head that the checkpoint lacks starts at random, with a warning.
        dtype: a torch dtype or its name; None keeps the checkpoint's own (float32 for GGUF).
        device: where to put it.
        trust_remote_code: whether to run Python code that comes with the model, if it does not
            load otherwise.

    Raises:
        ModelError: there is no such folder or file, it is not a model, it needs code of its own
            that is not trusted, or the hub cannot be reached; or the dtype or device is none.
    """
    dtype = None if dtype is None else parse_dtype(dtype)
    place = usable_device(device, ModelError)
    where, options = _locate(source, trust_remote_code)
    packed = "gguf_file" in options
    if packed:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
        dtype = dtype or torch.float32
    with _loading_errors(source):
        config, kind = _config_and_class(where, task, options)
        if not packed:
            _dequantise(config)
        model, loaded = kind.from_pretrained(
            where, config=config, dtype=dtype or "auto", output_loading_info=True, **options
        )
    missing = sorted(loaded["missing_keys"])
    heads = [name for name in missing if name.partition(".")[0].endswith(_HEADS)]
    if heads == missing != []:
        says = f"the head of {type(model).__name__} ({heads[0]}) is not in {os.fspath(source)}"
        warn(f"{says}: it starts at random, and is trained with the adapter", CordaWarning)
    elif missing:
        raise ModelError(
            f"{os.fspath(source)} lacks {len(missing)} weights of {type(model).__name__}, which "
            f"would start at random ({', '.join(missing[:3])}): copy its files again, or take the "
            "checkpoint of such a model"
        )
    if packed:
        model.name_or_path = model.config._name_or_path = os.fspath(source)
    try:
        return model.eval().to(place)
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error)
        raise ModelError(f"cannot move the model to device {device!r}: {reason}") from error


def _dequantise(config: Any) -> None:
    """Makes transformers dequantise the weights while it loads them, if it can."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored: Any = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if kind is not None and "dequantize" in inspect.signature(kind).parameters:
        stored["dequantize"] = True


def load_skeleton(
    source: StrPath,
    *,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A transformers model on the meta device, of which only the config is read.

    Args:
        source: as in `load_model`.
        task: as in `load_model`.
        dtype: as in `load_model`.
        trust_remote_code: as in `load_model`.

    Raises:
        ModelError: as in `load_model`.
    """
    dtype = None if dtype is None else parse_dtype(dtype)
    where, options = _locate(source, trust_remote_code)
    with _loading_errors(source), torch.device("meta"):
        config, kind = _config_and_class(where, task, options)
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        if hasattr(kind, "from_config"):
            model = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            model = kind(config).to(dtype)
    return model.eval()


def _config_and_class(where: str, task: str | None, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model's config, and the class of transformers to load it with: one of its automatic ones
    for the task, or the model's own.

    Raises:
        ModelError: there is no such task.
    """
    import transformers

    if task is not None and task not in TASKS:
        raise ModelError(f"task {shown(task)} is not one of {', '.join(TASKS)}")
    config = transformers.AutoConfig.from_pretrained(where, **options)
    if task is None:
        coded = (options["trust_remote_code"] and getattr(config, "auto_map", None)) or {}
        own = getattr(transformers, (config.architectures or [""])[0], None)
        if own is not None and not coded:
            return config, own
        usual = "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
        task = next((known for known, auto in TASKS.items() if auto in coded), usual)
    return config, getattr(transformers, TASKS[task])


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype, by its name or itself: float32, bfloat16, float16 or float64.

    Raises:
        ModelError: it is another one.
    """
    names = [str(known).removeprefix("torch.") for known in _DTYPES]
    for name, known in zip(names, _DTYPES, strict=True):
        if isinstance(dtype, str | torch.dtype) and dtype in (name, known):
            return known
    raise ModelError(f"dtype {shown(dtype)} is not one of {', '.join(names)}")


def load_tokenizer(source: StrPath, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to a model; the arguments are as in `load_model`.

    Raises:
        ModelError: there is none, or it cannot be read, or needs code of its own that is not
            trusted.
    """
    from transformers import AutoTokenizer

    where, options = _locate(source, trust_remote_code)
    names = os.listdir(where) if os.path.isdir(where) and "gguf_file" not in options else None
    if names is not None and not any(re.fullmatch(_TOKENIZER, name) for name in names):
        raise ModelError(
            f"{where} has no tokenizer: copy the tokenizer's files (tokenizer.json, "
            "tokenizer_config.json) there, from where the model comes from"
        )
    with _loading_errors(source):
        return AutoTokenizer.from_pretrained(where, **options)


def save_model(
    model: PreTrainedModel,
    path: StrPath,
    *,
    source: StrPath,
    card: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Writes a model's folder with its tokenizer, whole or not at all.

    A model that the folder holds already is replaced, other files stay.

    Args:
        model: any.
        path: the folder.
        source: where its tokenizer is. Without one there is a warning, and none is written.
        card: the model card, README.md; None for none.
        trust_remote_code: of the tokenizer, as in `load_model`.

    Raises:
        OutputError: the folder cannot be written; what was there is as it was.
    """
    saved: list[Any] = [model]
    try:
        saved.append(load_tokenizer(source, trust_remote_code=trust_remote_code))
    except ModelError as error:
        warn(f"{path} gets no tokenizer: {error}", CordaWarning)
    with staged_folder(path, replaced=MODEL_FILES) as folder:
        try:
            for each in saved:
                each.save_pretrained(folder)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")
        except Exception as error:  # as in _loading_errors; this may be a full disk
            raise OutputError(
                f"cannot write the model to {path}: {_first_line(error)}; free some space or choose"
                " another output path"
            ) from error


def _locate(source: StrPath, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model, and the options with which it is to load it from there."""
    path = readable_path(source, ModelError)
    text = os.fspath(source)
    # Said either way: transformers would ask on the terminal.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path.is_file() and path.suffix.lower() == ".gguf":
        return str(path.parent), options | {"gguf_file": path.name}
    wrong = ""
    if path.is_file():
        wrong = " is a file, but not a GGUF file: give the model's folder, hub id or .gguf file"
    elif path.is_dir():
        if not (path / "config.json").is_file():
            wrong = " has no config.json: it is not the folder of a transformers model"
    elif text.count("/") > 1 or text.startswith((".", "/", "~")) or path.suffix == ".gguf":
        wrong = ": no such model folder or file"
    if wrong:
        raise ModelError(f"{text}{wrong}")
    return text, options


@contextlib.contextmanager
def _loading_errors(source: StrPath) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers, tokenizers and safetensors have no common base
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{os.fspath(source)} needs Python code that comes with it, which is not run "
                "unasked: read that code, then pass trust_remote_code=True (--trust-remote-code)"
            ) from error
        reason = f"{os.fspath(source)}: {_first_line(error)}"
        if not os.path.exists(source):
            reason += " (there is no such folder; a hub id needs network access or a filled cache)"
        raise ModelError(f"cannot load {reason}") from error


def _first_line(error: BaseException) -> str:
    """The first line of the error's message, with the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


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


def language_model(model: nn.Module) -> nn.Module:
    """The part of a vision– or audio–language model that writes the text; else the model itself."""
    config = getattr(model, "config", None)
    apart = _part(config, "get_text_config") is not config and not is_encoder_decoder(model)
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
    text = _part(getattr(model, "config", None), "get_text_config")
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
    text = _part(getattr(model, "config", None), "get_text_config")
    count = getattr(text, "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that computes the logits, if the model says which it is."""
    head = _part(model, "get_output_embeddings")
    return head if isinstance(head, nn.Module) else None


def classification_heads(model: nn.Module) -> list[str]:
    """The heads of a transformers model that are made for a task anew, and so are trained whole."""
    parts = model.named_children() if hasattr(model, "config") else ()
    return [name for name, part in parts if name.endswith(_HEADS) and list(part.parameters())]


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
        ModelError: the model is none.
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
        targets: "all-linear" for every linear layer except the output and classification heads;
            None for the same, of a vision–language model those of its language model; a list of
            names of modules and expert parameters, or of their endings
            (`["q_proj", "experts.down_proj"]`); or a regular expression that the whole name must
            match.
        exclude: names, endings or a regular expression of layers to leave out.
        experts: whether fused experts are asked for, which makes "all-linear" all of them as well.

    Returns:
        Both in the model's order. One of them may be empty.

    Raises:
        TargetError: `targets` or `exclude` match nothing, also with a single ending; `exclude`
            leaves nothing; the output head is asked for although it is tied to the embeddings;
            `experts` are asked for, but the model has no fused ones, or none is selected; or layers
            hold the integers of GPTQ or AWQ.
        ModelError: the model is none.
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
        for name in classification_heads(model):
            inside -= set(model.get_submodule(name).modules())
        chosen = {name for name, module in linears.items() if module in inside}
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


def unreached_weights(
    model: nn.Module, targets: str | Sequence[str] | None = None
) -> dict[str, str]:
    """Matrices that are in no linear layer, and so in reach of no adapter, by name with the reason.

    Such are the experts of Mixtral or Qwen-MoE in transformers 5, one 3-D parameter for all experts
    of a layer, which come first, and their routers. Embeddings, convolutions and the output head
    are left out on purpose and not listed. With `targets` None it is about the language model of a
    vision–language model alone.
    """
    found: dict[str, tuple[int, str]] = {}
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
