"""The model card of a folder that holds an adapter: what it is, how it was made, how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from corda_kernels.adapter.factors import MODES
from corda_kernels.adapter.record import AdapterRecord

CARD_FILE = "README.md"
# What vLLM's --max-lora-rank may be (MaxLoRARanks in its config/lora.py, as of 0.14).
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_ENVIRONMENT = Environment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


def adapter_card(record: AdapterRecord, rank: int) -> str:
    """The card of an adapter that was made here.

    Args:
        record: how it was made.
        rank: the LoRA's largest.
    """
    maker = f"corda_kernels {record.versions.get('corda_kernels', '')}".rstrip()
    tokens = max((layer.tokens for layer in record.layers.values()), default=0)
    components = f"{record.rank} components of each layer at most, calibrated"
    if record.mode == "task":
        components = "Its gradient is taken"
    why = f"{record.trains}, {MODES[record.mode].purpose}"
    made = f"Initialised by {maker} in mode {record.mode.upper()}, from {why}. "
    made += f"{components} on {tokens:,} tokens."
    form = "published" if record.residual else "budget" if record.allocation else "plain"
    if record.mode == "task":
        form = "frozen" if record.freeze_a else "task"
    return render_card(record.base["source"], "CorDA adapter", made, form, rank)


def export_card(source: str | None, rank: int, note: str) -> str:
    """The card of an exported LoRA.

    Args:
        source: name of the base.
        rank: of every layer.
        note: how it came about.
    """
    made = f"A plain LoRA of rank {rank} for the untouched base. {note}"
    return render_card(source, "LoRA", made, "export", rank)


def render_card(
    source: str | None, title: str, made: str, form: str = "model", rank: int = 0
) -> str:
    """A card: front matter as the hub reads it, then the text.

    Args:
        source: name of the base.
        title: what it is.
        made: how it came about, and what it is for.
        form: by which the text goes: "model" for a whole one, else of a LoRA.
        rank: of a LoRA.
    """
    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    return _ENVIRONMENT.from_string(template).render(
        source=source,
        source_as_json=json.dumps(source),  # JSON strings are YAML ones too
        title=title,
        made=made,
        form=form,
        rank=rank,
        served=next((each for each in SERVED_RANKS if each >= rank), None),
        most=SERVED_RANKS[-1],
    )
