"""What four trainers do with an adapter's folder, call by call, without the trainers.

Each was read at the version that it names, with the configuration under examples/trainers. Left out
is what touches neither the base's weights nor the adapter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

REENTRANT = partial(checkpoint, use_reentrant=True)


def load_base(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")


def axolotl(base: str, adapter: str) -> PeftModel:
    """0.19.0: `ModelLoader._configure_embedding_dtypes`, then `load_adapter` and `load_lora`."""
    model = load_base(base)
    for dtype in (torch.float32, torch.bfloat16):
        for name, module in model.named_modules():
            if "norm" in name or name.endswith(("embed_tokens", "lm_head")):
                module.to(dtype)
    model.enable_input_require_grads()
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def llama_factory(base: str, adapter: str) -> PeftModel:
    """0.9.5: `prepare_model_for_training`, `_setup_lora_tuning`, `load_model`."""
    model = load_base(base)

    def checkpointed(forward: Any, hidden: torch.Tensor, *others: Any) -> Any:
        return REENTRANT(forward, hidden.requires_grad_(), *others)

    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpointed)
    model.config.use_cache = False
    model = PeftModel.from_pretrained(
        model,
        adapter,
        is_trainable=True,
        subfolder=None,
        offload_folder="offload",
        cache_dir=None,
        revision="main",
        token=None,
    )
    return in_float32(model, torch.bfloat16).train()


def ms_swift(base: str, adapter: str) -> PeftModel:
    """4.6.0: `TunerMixin.prepare_model`, `Swift.from_pretrained`, the trainer's checkpointing."""
    model = load_base(base).requires_grad_(False)
    config = LoraConfig(**PeftConfig.from_pretrained(adapter).to_dict())  # one of its own class
    model = PeftModel.from_pretrained(
        model, adapter, revision=None, adapter_name="default", is_trainable=True, config=config
    )
    for folder in Path(adapter).iterdir():
        if (folder / "adapter_config.json").exists():
            model.load_adapter(folder, folder.name, is_trainable=True)
    in_float32(model, torch.float16)
    model._set_gradient_checkpointing(gradient_checkpointing_func=REENTRANT)
    model.enable_input_require_grads()
    return model


def unsloth(adapter: str) -> PeftModel:
    """2026.10.9: `FastLanguageModel.from_pretrained`, `prepare_model_for_training`."""
    model = load_base(str(PeftConfig.from_pretrained(adapter).base_model_name_or_path))
    model = PeftModel.from_pretrained(
        model,
        adapter,
        token=None,
        revision=None,
        local_files_only=False,
        is_trainable=True,
        trust_remote_code=False,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
    model._set_gradient_checkpointing(gradient_checkpointing_func=REENTRANT)
    model.enable_input_require_grads()
    return in_float32(model, torch.bfloat16)


def in_float32(model: PeftModel, dtype: torch.dtype) -> PeftModel:
    """What is trained in `dtype`, cast."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == dtype:
            parameter.data = parameter.data.float()
    return model
