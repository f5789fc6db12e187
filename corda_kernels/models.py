"""Models and tokenizers: loading them, and writing a model's folder."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from corda_kernels.arguments import readable_path, shown, usable_device
from corda_kernels.errors import CordaWarning, ModelError, OutputError, first_line, warn
from corda_kernels.outputs import staged_folder
from corda_kernels.structure import TASK_HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        source: a folder, a hub id, or a GGUF file. Weights that transformers can dequantise while
            loading (GGUF, compressed-tensors, fine-grained FP8, MXFP4) become floating-point
            numbers; those of bitsandbytes and torchao stay as they are.
        task: task to load the model for, such as "causal-lm" or "sequence-classification" (see
            `corda_kernels.models.TASKS`); None for the class that its config names. A
            classification head that the checkpoint lacks starts at random, with a warning.
        dtype: a torch dtype or its name; None keeps the checkpoint's own (float32 for GGUF).
        device: device to put the model on.
        trust_remote_code: whether to run Python code that comes with the model, if it does not
            load otherwise.

    Raises:
        ModelError: there is no such folder or file, it is not a model, it needs code of its own
            that is not trusted, or the hub cannot be reached; or there is no such dtype or device.

    """
    dtype = None if dtype is None else parse_dtype(dtype)
    place = usable_device(device, ModelError)
    where, options = _locate(source, trust_remote_code)
    packed = "gguf_file" in options
    if packed:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        if "gguf" in AUTO_QUANTIZATION_CONFIG_MAPPING:  # before 5.17 it is always dequantised
            gguf = AUTO_QUANTIZATION_CONFIG_MAPPING["gguf"]
            options["quantization_config"] = gguf(dequantize=True)
        dtype = dtype or torch.float32
    with _loading_errors(source):
        config, kind = _config_and_class(where, task, options)
        if not packed:
            _dequantise(config)
        model, loaded = kind.from_pretrained(
            where, config=config, dtype=dtype or "auto", output_loading_info=True, **options
        )
    missing = sorted(loaded["missing_keys"])
    heads = [name for name in missing if name.partition(".")[0].endswith(TASK_HEADS)]
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
        says = f"cannot move the model to device {device!r}: {first_line(error)}"
        raise ModelError(says) from error


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
    """Loads a model's tokenizer; the arguments are as in `load_model`.

    Raises:
        ModelError: there is no tokenizer, it cannot be read, or it needs code of its own that is
            not trusted.

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
                f"cannot write the model to {path}: {first_line(error)}; free some space or choose"
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
        reason = f"{os.fspath(source)}: {first_line(error)}"
        if not os.path.exists(source):
            reason += " (there is no such folder; a hub id needs network access or a filled cache)"
        raise ModelError(f"cannot load {reason}") from error
