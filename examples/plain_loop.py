"""A KPM adapter, trained by a plain loop of torch.

    python examples/plain_loop.py MODEL KNOWLEDGE TASK OUT

KNOWLEDGE is text that the model should keep, TASK is text to learn. `token_batches` says which
files it reads.
"""

from __future__ import annotations

import sys

import torch

from corda_kernels import (
    CordaConfig,
    init_corda,
    load_model,
    load_tokenizer,
    save_adapter,
    token_batches,
)

source, knowledge, task, out = sys.argv[1:]
tokenizer = load_tokenizer(source)
model = load_model(source, dtype="float32")
kept = token_batches(knowledge, tokenizer, samples=16, seq_len=128)
model = init_corda(model, kept, CordaConfig("kpm", rank=8))

model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4)
for batch in token_batches(task, tokenizer, samples=16, seq_len=128):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")

save_adapter(model, out)  # PeftModel.from_pretrained(base, out) loads it
