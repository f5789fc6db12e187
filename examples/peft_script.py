"""A script for PEFT's own CorDA, on this package's numerics.

    python examples/peft_script.py MODEL TEXT OUT

New in it are the import of `patch_peft`, its call, and `save_adapter` at the end. The cache file
keeps what the adapter was at its start.
"""

from __future__ import annotations

import sys

import torch

from corda_kernels.peft_corda import patch_peft, save_adapter

patch_peft()

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.tuners.lora.config import CordaConfig  # noqa: E402
from peft.tuners.lora.corda import preprocess_corda  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

source, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
with open(text, encoding="utf-8") as file:
    lines = [line.strip() for line in file if line.strip()][:64]


@torch.no_grad()
def run_model() -> None:
    for line in lines:
        model(**tokenizer(line, truncation=True, max_length=128, return_tensors="pt"))


config = LoraConfig(
    r=8,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj"],
    init_lora_weights="corda",
    corda_config=CordaConfig(corda_method="ipm", cache_file=f"{out}.cache.pt"),
    task_type="CAUSAL_LM",
)
preprocess_corda(model, config, run_model=run_model)
model = get_peft_model(model, config)
# ... train ...
save_adapter(model, out)  # for the untouched base, which PEFT's own save_pretrained does not fit
