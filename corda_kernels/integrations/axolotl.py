"""A plugin of axolotl: the run's adapter starts from CorDA, and axolotl loads and trains it.

plugins: [corda_kernels.integrations.axolotl.CordaPlugin]
corda: {mode: ipm, rank: 16}
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from corda_kernels.adapter.folder import write_adapter
from corda_kernels.errors import ConfigError
from corda_kernels.init import CordaConfig, corda_adapter
from corda_kernels.models import load_model
from corda_kernels.text import token_batches


class CordaArgs(BaseModel):  # type: ignore[misc]
    """What the plugin adds to axolotl's configuration.

    Attributes:
        corda: the arguments of `CordaConfig`; and `samples`, the most rows of the run's own data to
            calibrate on (256), or `text`, the arguments of `token_batches` but for the tokenizer.
    """

    corda: dict[str, Any] | None = None


class CordaPlugin(BasePlugin):  # type: ignore[misc]
    """Makes the adapter in `output_dir`/corda-start, and sets `lora_model_dir` to that."""

    def get_input_args(self) -> str:
        """Names the class that extends axolotl's configuration."""
        return f"{__name__}.CordaArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Calibrates, unless an adapter is given, and leaves the data to axolotl.

        It is the last hook before axolotl patches the model's classes, whose attention then reads
        an adapter's layers that a base does not have yet.

        Raises:
            ConfigError: axolotl would not train the adapter, or runs several processes.
            CordaError: see `load_model` and `corda_adapter`.
        """
        if not cfg.corda or cfg.lora_model_dir or preprocess:
            return
        if cfg.rl or cfg.adapter not in ("lora", "qlora"):
            raise ConfigError(
                "corda is for adapter: lora or qlora, and not for rl: docs/guide/trainers.md has "
                f"the other ways, got adapter: {cfg.adapter}, rl: {cfg.rl}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "the plugin calibrates in one process: make the adapter by corda-kernels init, and "
                "give its folder as lora_model_dir"
            )
        options = {**cfg.corda}
        samples, text = options.pop("samples", 256), options.pop("text", None)
        config = CordaConfig(**options)
        batches = _text(cfg, text) if text else _rows(cfg, samples)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(cfg.base_model, device=device)
        folder = Path(cfg.output_dir) / "corda-start"
        write_adapter(corda_adapter(model, batches, config), folder)
        cfg.lora_model_dir = str(folder)


def _text(cfg: Any, arguments: Any) -> list[dict[str, torch.Tensor]]:
    from axolotl.loaders import load_tokenizer

    return token_batches(tokenizer=load_tokenizer(cfg), **arguments)


def _rows(cfg: Any, samples: int) -> list[dict[str, torch.Tensor]]:
    from axolotl.common.datasets import load_datasets

    # Not `take`, which raises an IndexError in datasets 4 where there are fewer.
    rows = islice(load_datasets(cfg=cfg).train_dataset, samples)
    return [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in rows]
