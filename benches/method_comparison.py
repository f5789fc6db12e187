"""A row of PEFT's method comparison (MetaMathQA) for a model with a CorDA start.

    python benches/method_comparison.py MODEL DATA OUT.json --mode ipm --rank 16
    … --rank 4 --samples 4 --max-steps 2 --eval-steps 1 --batch-size 1 --problems 1 --prose 1 \
        --max-new-tokens 4 --max-seq-length 128          # a minute on a core, to see that it runs

The loop, the defaults and the JSON are those of method_comparison/MetaMathQA/run.py in PEFT's
repository as of August 2026, without its validations on the way. The data are not its own: DATA is
a folder with gsm8k_train.jsonl and gsm8k_test.jsonl (`question`, `answer`), --train takes another
file to train on, and --text prose in place of Wikipedia. So compare such rows with each other;
--mode lora makes that of a plain LoRA.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from finetuning.data import Item, gradient_batches, problems, prose, training_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from corda_kernels import CordaConfig, init_corda, load_model, load_tokenizer
from corda_kernels.files import write_json
from corda_kernels.sources import help_topics

GPU = torch.cuda.is_available()
# Of PEFT's default_training_params.json. What a flag names can be changed.
FLAGS = {"max_steps": 5000, "eval_steps": 250, "batch_size": 4, "max_seq_length": 768, "seed": 0}
FIXED = {
    "dtype": "bfloat16" if GPU else "float32",
    "batch_size_eval": 50,
    "compile": False,
    "use_gc": False,
    "query_template": "Question: {query}\nAnswer:",
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "init_kv_cache_prefix": None,
}
_FINAL = re.compile(r"(?:answer is:?|####) *([^\n]+)")
_PROSE_TOKENS = 256


def final(text: str) -> str | None:
    """The answer that a text ends with."""
    found = _FINAL.findall(text)
    return found[-1].strip(" .!?$%").removesuffix(".0") if found else None


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, items: Sequence[Item], new_tokens: int) -> float:
    """The share of problems whose generated answer is right."""
    right = 0
    for first in range(0, len(items), FIXED["batch_size_eval"]):
        part = items[first : first + FIXED["batch_size_eval"]]
        prompts = tokenizer.pad(
            {"input_ids": [item.prompt for item in part]}, return_tensors="pt", padding_side="left"
        ).to(model.device)
        options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        made = model.generate(**prompts, max_new_tokens=new_tokens, **options)
        for item, ids in zip(part, made, strict=True):
            expected, said = (final(tokenizer.decode(each)) for each in (item.answer, ids))
            right += said is not None and said == expected
    return right / len(items)


@torch.inference_mode()
def prose_loss(model: Any, text: Tensor) -> float:
    """Mean loss of a token of `text`, (documents, tokens) int64, in nats."""
    return statistics.fmean(
        float(model(input_ids=ids, labels=ids).loss) for ids in text.to(model.device).split(1)
    )


def train(given: argparse.Namespace, model: Any, items: list[Item]) -> Any:
    """Trains as PEFT does, and returns the loss, the tokens and the bytes reserved of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.learning_rate, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, given.max_steps // 10, given.max_steps)
    batches = training_batches(
        items * -(-given.max_steps * given.batch_size // len(items)),  # as many epochs as it takes
        steps=given.max_steps,
        size=given.batch_size,
        seed=given.seed,
    )
    steps = []
    model.train()
    for batch in (batch.to(model.device) for batch in batches):
        labels = batch.ids.masked_fill(~batch.real, -100)
        loss = model(input_ids=batch.ids, attention_mask=batch.real.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, FIXED["grad_norm_clip"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        reserved = torch.cuda.memory_reserved() if GPU else 0
        steps.append((loss.item(), int(batch.real.sum()), reserved))
    model.eval()
    return zip(*steps, strict=True)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def row(given: argparse.Namespace) -> dict[str, Any]:
    """Does the run, and describes it as PEFT's log_results does."""
    began = time.perf_counter()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    torch.manual_seed(given.seed)
    tokenizer: Any = load_tokenizer(given.model)
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = load_model(given.model, dtype=FIXED["dtype"], device="cuda" if GPU else "cpu")
    file = given.train or given.data / "gsm8k_train.jsonl"
    items = problems(file, tokenizer, max_tokens=given.max_seq_length, end=True)
    if given.mode == "lora":
        size = 2 * given.rank
        config = LoraConfig(r=size, lora_alpha=size, target_modules="all-linear")
        model = get_peft_model(model, config)
    else:
        text = gradient_batches(items[: given.samples], given.batch_size)
        model = init_corda(model, text, CordaConfig(given.mode, rank=given.rank))
    trainable, total = model.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        source = given.text or help_topics(Path(folder) / "help.txt")
        text = prose(source, tokenizer, samples=given.prose, length=_PROSE_TOKENS)
    with model.eval().disable_adapter():
        before = prose_loss(model, text)
    clock = time.perf_counter()
    losses, tokens, reserved = train(given, model, items)
    training = time.perf_counter() - clock
    test = problems(
        given.data / "gsm8k_test.jsonl", tokenizer, max_tokens=given.max_seq_length, end=False
    )
    metrics = {
        "step": given.max_steps,
        "test accuracy": accuracy(model, tokenizer, test[: given.problems], given.max_new_tokens),
        "train loss": statistics.fmean(losses[-given.eval_steps :]),
        "train samples": given.max_steps * given.batch_size,
        "train total tokens": sum(tokens),
        "forgetting": prose_loss(model, text) - before,
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    name = Path(given.model).name
    method = "lora" if given.mode == "lora" else f"corda-{given.mode}"
    config = model.peft_config["default"].to_dict()
    packages = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    system = ("system", "release", "version", "machine", "processor")
    none = {"sha": None, "created_at": None}
    return {
        "run_info": {
            "created_at": created,
            "total_time": time.perf_counter() - began,
            "experiment_name": f"{method}/{name}-rank{2 * given.rank}",
            "peft_branch": f"v{version('peft')}",
            "peft_worktree_is_dirty": False,
            "train_config": {
                "model_id": name,
                **{flag: getattr(given, flag) for flag in FLAGS},
                **FIXED,
                "optimizer_kwargs": {"lr": given.learning_rate, "weight_decay": 0.1},
                "generation_kwargs": {"max_new_tokens": given.max_new_tokens},
            },
            "peft_config": json.loads(json.dumps(config, default=sorted)),  # sets, as lists
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(statistics.fmean(reserved)),
            "accelerator_memory_max": torch.cuda.max_memory_reserved() if GPU else 0,
            "accelerator_memory_reserved_99th": sorted(reserved)[int(0.99 * len(reserved))],
            "train_time": training,
            "file_size": size,
            "num_trainable_params": trainable,
            "num_total_params": total,
            "status": "success",
            "metrics": [metrics],
        },
        "meta_info": {
            "model_info": none,
            "dataset_info": {"metamath": none, "gsm8k": none},
            "package_info": {f"{each}-version": version(each) for each in packages}
            | {f"{each}-commit-hash": None for each in packages},
            "system_info": {each: getattr(platform, each)() for each in system}
            | {"accelerator": torch.cuda.get_device_name() if GPU else "none"},
            "pytorch_info": torch.__config__.show(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, hub id or GGUF file")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mode", choices=("ipm", "task", "lora"), default="ipm")
    parser.add_argument("--rank", type=int, default=16, help="components; the LoRA's is twice that")
    parser.add_argument("--samples", type=int, default=256, help="problems to calibrate on")
    parser.add_argument("--train", type=Path, help="JSON lines of question and answer")
    parser.add_argument("--text", type=Path, help="prose, instead of Python's help topics")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--problems", type=int, help="problems of the test, all by default")
    for flag, default in (FLAGS | {"max_new_tokens": 300, "prose": 64}).items():
        parser.add_argument(f"--{flag.replace('_', '-')}", type=int, default=default)
    given = parser.parse_args()
    write_json(given.out, row(given))


if __name__ == "__main__":
    main()
