"""TRL's supervised fine-tuning from an IPM start.

    python examples/trl_sft.py MODEL DATA OUT

It takes TRL: pip install -c constraints.txt trl

DATA is a JSON lines file of `messages`, `prompt` and `completion`, or `text`.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from corda_kernels import CordaConfig, init_corda, load_model, load_tokenizer, token_batches

source, data, out = sys.argv[1:]
gpu = torch.cuda.is_available()
tokenizer = load_tokenizer(source)
model = load_model(source, dtype="float32", device="cuda" if gpu else "cpu")
rows = load_dataset("json", data_files=data, split="train")
batches = token_batches(
    rows, tokenizer, samples=16, seq_len=128, chat_template="text" not in rows.column_names
)
model = init_corda(model, batches, CordaConfig("ipm", rank=8))

trainer = SFTTrainer(
    model,  # no peft_config: the adapter is there already
    args=SFTConfig(
        output_dir=out,
        learning_rate=2e-4,
        max_steps=20,
        bf16=gpu,
        use_cpu=not gpu,
        report_to=[],
    ),
    train_dataset=rows,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(out)  # PeftModel.from_pretrained(base, out) loads it
