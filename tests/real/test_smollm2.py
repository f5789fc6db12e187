"""The whole job on SmolLM2-135M's first blocks: init, training with a resume, export, merge.

The demo, which `.ci/run` starts, takes all 30 blocks.
"""

import copy
import math

import pytest
import torch
from peft import PeftModel
from stages import one_stage
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from corda_kernels import (
    CordaConfig,
    export_lora,
    init_corda,
    load_model,
    load_tokenizer,
    merge,
    save_adapter,
    token_batches,
)
from corda_kernels.errors import CordaWarning
from corda_kernels.planning import layer_spectra, uniform_budget
from corda_kernels.planning.scores import CONDITIONS
from corda_kernels.targets import target_linears

pytestmark = [pytest.mark.real, pytest.mark.slow]

RANK = 32


@pytest.fixture(scope="module")
def batches(base_folder, text):
    return token_batches(text, load_tokenizer(base_folder), samples=24, seq_len=64)


@pytest.fixture(scope="module")
def probe(batches):
    return torch.cat([batch["input_ids"] for batch in batches[-2:]])


@pytest.fixture(scope="module")
def covariances(base_folder, batches):
    return one_stage(load_model(base_folder), batches[:16], rank=None, progress=False)


@pytest.fixture(scope="module")
def bound(base_folder, probe) -> float:
    """Three times what float32 itself costs this model."""
    model = load_model(base_folder)
    single = logits(model, probe)
    return 3 * float((single - logits(model.double(), probe)).abs().max())


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def linears(base_folder):
    return target_linears(load_model(base_folder))


def assert_same_logits(model, reference, probe, bound):
    assert float((logits(model, probe) - reference).abs().max()) <= bound


def test_q_k_v_hold_one_matrix_and_the_head_none(covariances):
    layer = "model.layers.1.self_attn."
    addresses = {covariances[f"{layer}{name}_proj"].matrix.data_ptr() for name in "qkv"}
    assert len(addresses) == 1
    assert covariances[f"{layer}o_proj"].matrix.data_ptr() not in addresses
    assert "lm_head" not in covariances
    assert (len(covariances), len(covariances.groups())) == (7 * 3, 4 * 3)


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.RankDeficientWarning")
def test_trained_adapter_survives_resume_export_and_merge(
    base_folder, batches, covariances, probe, bound, tmp_path
):
    base = load_model(base_folder)
    at_start = logits(base, probe)
    model = init_corda(base, covariances, CordaConfig("ipm", rank=RANK, progress=False))
    save_adapter(model, tmp_path / "fresh")
    assert torch.equal(logits(model, probe), at_start)

    def fresh():
        base = load_model(base_folder)
        return PeftModel.from_pretrained(base, tmp_path / "fresh", is_trainable=True)

    model = fresh()
    assert torch.equal(logits(model, probe), at_start)
    assert sum(p.requires_grad for p in model.parameters()) == 14 * 3
    examples = [
        {"input_ids": batch["input_ids"][0], "labels": batch["input_ids"][0]} for batch in batches
    ]

    def arguments(steps: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=3,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )

    Trainer(model=model, args=arguments(3), train_dataset=examples).train()
    resumed = fresh()
    Trainer(model=resumed, args=arguments(6), train_dataset=examples).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
    )
    trained = logits(resumed, probe)
    assert float((trained - at_start).abs().max()) > 100 * bound

    checkpoint = tmp_path / "run" / "checkpoint-6"
    export_lora(checkpoint, tmp_path / "lora")
    for folder in (checkpoint, tmp_path / "lora"):
        stock = PeftModel.from_pretrained(load_model(base_folder), folder)
        assert stock.peft_config["default"].r == 2 * RANK
        assert torch.equal(logits(stock, probe), trained)

    merge(copy.deepcopy(resumed)).save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_logits(plain, trained, probe, bound)


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.RankDeficientWarning")
def test_ranks_under_a_budget_load_train_export_and_merge(
    base_folder, batches, covariances, probe, bound, tmp_path
):
    base = load_model(base_folder)
    at_start = logits(base, probe)
    config = CordaConfig("kpm", budget="r=32", progress=False)
    model = init_corda(base, covariances, config)
    assert torch.equal(logits(model, probe), at_start)
    allocation = model.corda_record.allocation
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == allocation["spent"]
    widest = 2 * (576 + 1536)
    assert allocation["budget"] - widest < trainable <= allocation["budget"]
    assert allocation["budget"] == uniform_budget(
        {name: tuple(m.weight.shape) for name, m in linears(base_folder).items()}, 32, rows=2
    )
    save_adapter(model, tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(load_model(base_folder), tmp_path / "adapter")
    ranks = {name: rank for name, rank in allocation["ranks"].items() if rank}
    for name, rank in ranks.items():
        assert fresh.get_base_model().get_submodule(name).r["default"] == 2 * rank

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for batch in batches[:4]:
        model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model, probe)
    assert float((trained - at_start).abs().max()) > 100 * bound
    with pytest.warns(CordaWarning, match=r"the LoRA has rank \d+, and vLLM serves 512 at most"):
        export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(load_model(base_folder), tmp_path / "lora")
    assert_same_logits(stock, trained, probe, bound)
    assert_same_logits(merge(model), trained, probe, bound)


def test_compactness_is_the_literal_one(base_folder, covariances):
    """By whole spectra in float64, in one of the blocks; `benches/selection.py` does it in all."""
    modules = {
        name: module for name, module in linears(base_folder).items() if name.split(".")[2] == "2"
    }
    found = {
        condition: layer_spectra(modules, covariances, condition=condition)
        for condition in CONDITIONS
    }
    for covariance, names in covariances.groups():
        C = covariance.matrix.double()
        C = (C / C.diagonal().mean() + 0.01 * torch.eye(len(C))) / 1.01
        names = [name for name in names if name in modules]
        values = torch.linalg.eigvalsh(C).flip(0).tolist() if names else []
        for name in names:
            weight = modules[name].weight.detach().double()
            sigma = torch.linalg.svdvals(weight @ C)
            for condition, pi in (
                ("ratio", values[0] / values[-1]),
                ("bound", values[0] ** 0.5 / values[-1]),
                ("tight", values[-1] ** -0.5),
            ):
                literal = math.log(pi * len(weight) ** 0.5) * float((sigma / sigma[0]).sum())
                score = found[condition][name].compactness
                assert score == pytest.approx(literal, rel=1e-4), (name, condition)
