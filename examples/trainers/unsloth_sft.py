"""Unsloth's supervised fine-tuning from a start that is a folder.

    python examples/trainers/unsloth_sft.py START DATA OUT

DATA is a JSON lines file of `messages`.
"""

from __future__ import annotations

import sys

from unsloth import FastLanguageModel  # isort: skip - patches TRL, so it comes first
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

start, data, out = sys.argv[1:]
# The base is the one that START names. No get_peft_model: the adapter is there already.
model, tokenizer = FastLanguageModel.from_pretrained(
    start, max_seq_length=512, load_in_4bit=False, use_exact_model_name=True
)
trainer = SFTTrainer(
    model,
    args=SFTConfig(output_dir=out, learning_rate=2e-4, max_steps=20, report_to=[]),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=tokenizer,
)
trainer.train()
model.save_pretrained(out)
