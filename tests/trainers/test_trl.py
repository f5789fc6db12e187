"""TRL's own trainers on an adapter from `init_corda`: references, losses, first steps, QLoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from kinds import Calibrated
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from corda_kernels import CordaConfig, init_corda

pytestmark = [
    pytest.mark.slow,
    # TRL, datasets and Trainer warn of what they do themselves.
    pytest.mark.filterwarnings("ignore"),
]

MODES = ["ipm", "kpm"]
Adapt = Callable[..., nn.Module]


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Preferences among made-up sentences."""
    return [
        {
            "prompt": f"w{i} w{i + 1} w{i + 2}",
            "chosen": f" w{i + 3} w{i + 4} w{i + 5}",
            "rejected": f" w{59 - i} w{50 - i} w{i + 3}",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Any) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    found = AutoTokenizer.from_pretrained(folder)
    found.pad_token = found.unk_token
    return found


def common(out: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **options,
    }


def of_log(trainer: Any, name: str) -> float:
    return next(entry[name] for entry in trainer.state.log_history if name in entry)


@torch.no_grad()
def reference_logits(model: Any, ids: Tensor) -> Tensor:
    """What TRL computes its reference from: adapter "ref", a copy of "default"."""
    from trl.trainer.utils import use_adapter  # as TRL does

    model.eval()
    with use_adapter(model, adapter_name="ref"):
        return model(input_ids=ids).logits


def make(kind: str, model: nn.Module, tokenizer: Any, out: Path) -> Any:
    data = rows()
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in data])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    if kind == "dpo":
        return DPOTrainer(
            model,
            args=DPOConfig(**common(out)),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
    if kind == "kto":
        labelled = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in data
            for name in ("chosen", "rejected")
        ]
        return KTOTrainer(
            model,
            args=KTOConfig(**common(out)),
            train_dataset=Dataset.from_list(labelled),
            processing_class=tokenizer,
        )
    generation = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1}
    trainer, config = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
    return trainer(
        model,
        reward_funcs=reward,
        args=config(**common(out, **generation)),
        train_dataset=prompts,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_the_reference_is_the_base_and_a_step_is_taken(
    calibrated: Calibrated, adapt: Adapt, tokenizer: Any, tmp_path: Path, kind: str, mode: str
) -> None:
    base, covariances = calibrated()
    model = adapt((copy.deepcopy(base), covariances), mode=mode)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    trainer = make(kind, model, tokenizer, tmp_path)
    trainer.train()
    if kind == "dpo":
        assert math.isclose(of_log(trainer, "loss"), math.log(2), abs_tol=1e-4)
    # Also after the step: the reference does not follow the policy.
    found = reference_logits(trainer.model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        assert not torch.equal(trainer.model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("mode", MODES)
def test_sft_lowers_the_loss_and_its_folder_is_the_trained_model(
    calibrated: Calibrated, adapt: Adapt, tokenizer: Any, tmp_path: Path, mode: str
) -> None:
    from peft import PeftModel

    base, covariances = calibrated()
    model = adapt((copy.deepcopy(base), covariances), mode=mode)
    text = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows(16)])
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**common(tmp_path, max_steps=20, learning_rate=1e-2)),
        train_dataset=text,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    ids = torch.randint(3, 60, (2, 9))
    loaded = PeftModel.from_pretrained(base, tmp_path / "trained")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits
        )


def moved(model: nn.Module, tokenizer: Any, out: Path) -> float:
    """The share of the factors' entries that 20 steps of SFT at 1e-4 have changed."""
    text = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows(16)])
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**common(out, max_steps=20, learning_rate=1e-4)),
        train_dataset=text,
        processing_class=tokenizer,
    )
    parameters = [each for each in trainer.model.parameters() if each.requires_grad]
    assert {each.dtype for each in parameters} == {torch.bfloat16}  # as TRL prepares QLoRA
    before = [each.detach().clone() for each in parameters]
    trainer.train()
    changed = sum(int((a != b).sum()) for a, b in zip(before, parameters, strict=True))
    return changed / sum(each.numel() for each in parameters)


def test_after_the_preparation_for_qlora_as_much_moves_as_in_a_plain_lora(
    tiny_model: Callable[..., nn.Module], tokenizer: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny_model("llama", initializer_range=0.1, **sizes).save_pretrained(tmp_path / "base")

    def quantised() -> nn.Module:
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options)

    lora = get_peft_model(
        quantised(),
        LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    expected = moved(lora, tokenizer, tmp_path / "lora")
    batches = torch.randint(3, 60, (4, 4, 12))
    for mode in MODES:
        model = init_corda(quantised(), batches, CordaConfig(mode, rank=4, progress=False))
        assert moved(model, tokenizer, tmp_path / mode) >= expected
