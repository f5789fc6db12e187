"""The model card of a folder that holds an adapter: what it is, how it was made, how to use it."""

from __future__ import annotations

import json

from corda_kernels.adapter.record import AdapterRecord

CARD_FILE = "README.md"
# What vLLM's --max-lora-rank may be (MaxLoRARanks in its config/lora.py, as of 0.14).
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_MODES = {
    "kpm": "KPM: the smallest components, so that what the calibration text holds is kept",
    "ipm": "IPM: the largest components, those that the calibration text uses most",
}

_PLAIN = """```python
from peft import PeftModel
model = PeftModel.from_pretrained(base, FOLDER, is_trainable=True)  # to train
model = PeftModel.from_pretrained(base, FOLDER)                     # to run
```"""
_EXPORTED = """```python
from peft import PeftModel
model = PeftModel.from_pretrained(base, FOLDER)
```"""
_MODEL = """```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```"""
_PUBLISHED = """\
This is CorDA's published form: W − B A of the untrained A and B stands in the base. \
It computes something else on the untouched base, where PEFT therefore refuses it.

```python
from corda_kernels import export_lora, load_for_training
model = load_for_training(base, FOLDER)  # train it, or run it
export_lora(FOLDER, "my-lora")           # a plain LoRA for the untouched base
```"""


def adapter_card(record: AdapterRecord, rank: int) -> str:
    """The card of an adapter that was made here.

    Args:
        record: how it was made.
        rank: the LoRA's largest.
    """
    version = record.versions.get("corda_kernels", "")
    tokens = max((layer["tokens"] for layer in record.layers.values()), default=0)
    made = (
        f"Initialised by {f'corda_kernels {version}'.rstrip()} with {_MODES[record.mode]}. "
        f"{record.rank} components of each layer at most, calibrated on {tokens:,} tokens."
    )
    source = record.base["source"]
    if record.residual is not None:
        return _card(source, "CorDA adapter", made, _PUBLISHED)
    plain = (
        f"It is a plain LoRA of rank {rank}, twice the number of components, and starts at zero. "
        "Train all of it."
    )
    serving = (
        "Its ranks differ from layer to layer. Engines that know one rank take what "
        '`corda_kernels.export_lora(FOLDER, "my-lora")` writes.'
        if record.allocation
        else _serving(rank)
    )
    return _card(source, "CorDA adapter", made, plain, _PLAIN, serving)


def export_card(source: str | None, rank: int, note: str) -> str:
    """The card of an exported LoRA.

    Args:
        source: name of the base.
        rank: of every layer.
        note: how it came about.
    """
    made = f"A plain LoRA of rank {rank} for the untouched base. {note}"
    return _card(source, "LoRA", made, _EXPORTED, _serving(rank))


def model_card(source: str | None, title: str, made: str) -> str:
    """The card of a whole model.

    Args:
        source: name of the base.
        title: what it is.
        made: how it came about, and what it is for.
    """
    return _card(source, title, made, _MODEL, library="transformers")


def _serving(rank: int) -> str:
    allowed = [each for each in SERVED_RANKS if each >= rank]
    if not allowed:
        return (
            f"vLLM serves rank {SERVED_RANKS[-1]} at most: cut it off (export_lora), or merge it."
        )
    return (
        "Serving engines load the folder as it is: `vllm serve BASE --enable-lora "
        f"--lora-modules NAME=FOLDER --max-lora-rank {allowed[0]}`."
    )


def _card(source: str | None, title: str, *paragraphs: str, library: str = "peft") -> str:
    """Front matter as the hub reads it, then the text; JSON strings are YAML ones too."""
    base = "" if source is None else f"base_model: {json.dumps(source)}\n"
    front = f"---\n{base}library_name: {library}\ntags:\n- lora\n- corda\n---"
    named = "a model without a name" if source is None else f"`{source}`"
    return "\n\n".join((front, f"# {title}", f"Base model: {named}.", *paragraphs)) + "\n"
