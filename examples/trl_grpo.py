"""TRL's reinforcement learning, GRPO, from an IPM start.

    python examples/trl_grpo.py MODEL PROBLEMS OUT

It takes TRL: pip install -c constraints.txt trl

PROBLEMS is a JSON lines file of `question` and `answer`, as GSM8K's. A completion earns a reward
where it has the last word of the answer.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from corda_kernels import CordaConfig, init_corda, load_model, load_tokenizer, token_batches

source, data, out = sys.argv[1:]
gpu = torch.cuda.is_available()
tokenizer = load_tokenizer(source)
model = load_model(source, dtype="float32", device="cuda" if gpu else "cpu")
batches = token_batches(
    data, tokenizer, samples=16, seq_len=128, template="{question}\nAnswer: {answer}"
)
model = init_corda(model, batches, CordaConfig("ipm", rank=8))


def solved(completions: list[str], answer: list[str], **_: object) -> list[float]:
    pairs = zip(completions, answer, strict=True)
    return [float(right.split()[-1] in text.split()) for text, right in pairs]


rows = load_dataset("json", data_files=data, split="train")
trainer = GRPOTrainer(
    model,  # no peft_config: the adapter is there already
    reward_funcs=solved,
    args=GRPOConfig(
        output_dir=out,
        learning_rate=1e-4,
        max_steps=5,  # and too short completions for a real run
        max_completion_length=64,
        bf16=gpu,
        use_cpu=not gpu,
        report_to=[],
    ),
    train_dataset=rows.map(lambda row: {"prompt": f"{row['question']}\nAnswer:"}),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(out)
