"""What tests of adapters' folders share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from corda_kernels.adapter import adapter_of

# PEFT looks for the base to see whether its embeddings have another size.
NO_BASE = "ignore:Could not find a config file in residual of:UserWarning"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
INITIAL = "corda_initial.safetensors"
FIRST = "model.layers.0.self_attn.q_proj"
FILES = {WEIGHTS, CONFIG, "corda.json", "README.md"}
BUDGET = {"budget": "r=4", "max_rank": 6}
PUBLISHED = {"residual": "weight"}


def factors(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in adapter_of(model).layers.items():
        found |= {f"{name}.A": layer.A, f"{name}.B": layer.B}
        if layer.initial is not None:
            found |= {f"{name}.A0": layer.initial.A, f"{name}.B0": layer.initial.B}
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def described(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config | {"target_modules": sorted(config["target_modules"])}


def written(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer in a folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    start, end = "base_model.model.", ".lora_A.weight"
    names = [key.removeprefix(start).removesuffix(end) for key in tensors if key.endswith(end)]
    return {
        name: (tensors[f"{start}{name}{end}"], tensors[f"{start}{name}.lora_B.weight"])
        for name in names
    }
