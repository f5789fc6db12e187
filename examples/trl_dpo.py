"""TRL's preference optimisation from a KPM start.

    python examples/trl_dpo.py MODEL KNOWLEDGE PREFERENCES OUT

It takes TRL: pip install -c constraints.txt trl

KNOWLEDGE is text that the model should keep. PREFERENCES is a JSON lines file of `prompt`,
`chosen` and `rejected`. No second model is needed for the reference: TRL switches the adapter off,
and what is left is the untouched base.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from corda_kernels import CordaConfig, init_corda, load_model, load_tokenizer, token_batches

source, knowledge, preferences, out = sys.argv[1:]
gpu = torch.cuda.is_available()
tokenizer = load_tokenizer(source)
model = load_model(source, dtype="float32", device="cuda" if gpu else "cpu")
kept = token_batches(knowledge, tokenizer, samples=16, seq_len=128)
model = init_corda(model, kept, CordaConfig("kpm", rank=8))

trainer = DPOTrainer(
    model,
    args=DPOConfig(
        output_dir=out,
        learning_rate=5e-5,
        max_steps=20,
        bf16=gpu,
        use_cpu=not gpu,
        report_to=[],
    ),
    train_dataset=load_dataset("json", data_files=preferences, split="train"),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(out)
