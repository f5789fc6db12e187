"""Adapters of fused experts, in both of their orientations, beside those of linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    calibrate,
    export_lora,
    init_corda,
    load_for_training,
    merge,
    save_adapter,
)
from corda_kernels.adapter import read_adapter, write_adapter
from corda_kernels.adapter.lora import WEIGHTS_FILE
from corda_kernels.calibration import Covariance
from corda_kernels.calibration.expert_layers import expert_names
from corda_kernels.errors import (
    AdapterError,
    ConfigError,
    CordaError,
    CovarianceError,
    RankError,
    TargetError,
)
from corda_kernels.experts import expert_parameters
from corda_kernels.init import check_targets, corda_adapter
from corda_kernels.linears import linear_shape
from corda_kernels.report.content import adapter_report
from corda_kernels.targets import target_linears
from corda_kernels.training import DriftPenalty

pytestmark = [
    pytest.mark.slow,
    # It looks for the names of parameters among those of modules.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_LATENT = {
    "head_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": _DEEPSEEK | _LATENT,
    "glm4_moe": _DEEPSEEK,
    "gpt_oss": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 24},
    "granitemoe": {"num_local_experts": 4},
}


def tiny(architecture: str) -> nn.Module:
    config = AutoConfig.for_model(architecture, **(_SIZES | MODELS[architecture]))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def covariance(width: int) -> Covariance:
    x = torch.randn(96, width) * torch.logspace(0, -1, width)
    return Covariance(x.T @ x / 96, 96, 1, x.abs().amax(0), torch.zeros(width).long(), 6.0)


def covariances(model: nn.Module) -> CovarianceSet:
    """What experts read of the hidden states is shared by all but one, what down_proj reads not."""
    found = {name: covariance(linear_shape(m)[1]) for name, m in target_linears(model).items()}
    for name, parameter in expert_parameters(model).items():
        names = [name, f"{name}.1"] if parameter.takes_hidden else expert_names(name, parameter)
        found |= {each: covariance(parameter.inputs) for each in names}
    return CovarianceSet(found)


def left_out(model: nn.Module) -> list[str]:
    """A gate of one output, which has no rank of 4, and routers, which return tuples."""
    odd = ("shared_expert_gate", "feed_forward.router", "block_sparse_moe.router.layer")
    return [name for name in target_linears(model) if name.endswith(odd)]


def config(mode: Any = "ipm", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"rank": 4, "experts": "shared", "progress": False} | options))


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(model: nn.Module, rate: float = 0.05) -> Tensor:
    """Its logits after two steps that change them a lot."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(2):
        ids = torch.randint(3, 64, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model)


def trained_and_served(model: nn.Module, plain: nn.Module, before: Tensor, folder: Path) -> Tensor:
    """The logits after training, which stock PEFT and a merged model have too."""
    after = trained(model)
    assert (after - before).norm() > 0.05 * before.norm()
    save_adapter(model, folder)
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    torch.testing.assert_close(logits(stock), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(stock)), after, rtol=1e-5, atol=1e-5)
    return after


@pytest.mark.parametrize("architecture", MODELS)
def test_experts_start_at_the_base_and_go_the_whole_way(architecture: str, tmp_path: Path) -> None:
    base = tiny(architecture)
    plain, before, found = copy.deepcopy(base), logits(base), covariances(base)
    linears, parameters = target_linears(base, exclude=left_out(base)), expert_parameters(base)
    options = {"exclude_modules": left_out(base)}
    model = init_corda(copy.deepcopy(base), found, config("kpm", **options))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    model = init_corda(base, found, config("ipm", **options))
    assert isinstance(model, PeftModel)
    assert model.corda_record.layers.keys() == linears.keys() | parameters.keys()
    assert {model.corda_record.layers[name].rank for name in parameters} == {2}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    after = trained_and_served(model, plain, before, tmp_path / "adapter")
    by_hand = copy.deepcopy(plain)
    layers = expert_parameters(by_hand)
    for name, layer in read_adapter(tmp_path / "adapter").layers.items():
        change = layer.change().product()
        if name not in layers:
            by_hand.get_submodule(name).weight.data += change
            continue
        for expert in range(layers[name].experts):
            weight = layers[name].weight(expert)
            weight += change[expert] if change[0].shape == weight.shape else change[expert].T
    torch.testing.assert_close(logits(by_hand), after, rtol=1e-5, atol=1e-5)


def test_each_expert_is_decomposed_by_itself_with_its_own_covariance() -> None:
    """The factors, in PEFT's orientation, against a dense SVD in float64."""
    for architecture, flipped in (("mixtral", False), ("gpt_oss", False), ("llama4_text", True)):
        base = tiny(architecture)
        found = covariances(base)
        options = {"exclude_modules": left_out(base), "damping": None, "hold": 2.0}
        adapter = corda_adapter(base, found, config(**options))
        for name, parameter in expert_parameters(base).items():
            factors = adapter.layers[name]
            assert factors.scaling == 1 / 2
            for expert, each in enumerate(expert_names(name, parameter)):
                A, B = factors.A[expert].double(), factors.B[expert].double()
                if flipped:
                    A, B = B.T, A.T
                W = parameter.weight(expert).double()
                U, _, _ = torch.linalg.svd(
                    W @ found[each if each in found else name].matrix.double()
                )
                P, S = B[:, :2], A[2:]
                assert not A[:2].any()
                assert not B[:, 2:].any()
                torch.testing.assert_close(
                    P @ torch.linalg.pinv(P), U[:, :2] @ U[:, :2].T, atol=1e-4, rtol=0
                )
                rows = (P / P.norm(dim=0)).T @ W
                torch.testing.assert_close(
                    S, 2 / 3**0.5 * rows / rows.norm(dim=1, keepdim=True), atol=1e-4, rtol=0
                )


@pytest.mark.parametrize("architecture", ["glm4_moe", "gpt_oss", "llama4_text"])
def test_a_folder_written_without_the_model_is_the_one_that_it_saves(
    architecture: str, tmp_path: Path
) -> None:
    base = tiny(architecture)
    found, options = covariances(base), {"exclude_modules": left_out(base)}
    write_adapter(corda_adapter(base, found, config(**options)), tmp_path / "written")
    save_adapter(init_corda(base, found, config(**options)), tmp_path / "saved")
    one, other = (load_file(tmp_path / each / WEIGHTS_FILE) for each in ("written", "saved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("architecture", "live"), [("glm4_moe", True), ("llama4_text", False)])
def test_a_budget_counts_experts_and_an_export_does_not_pad_them(
    architecture: str, live: bool, tmp_path: Path
) -> None:
    base = tiny(architecture)
    plain, parameters, found = copy.deepcopy(base), expert_parameters(base), covariances(base)
    options = {"exclude_modules": left_out(base)}
    uniform = corda_adapter(base, found, config(**options))
    model = init_corda(base, found, config("kpm", **options, budget="r=4", max_rank=7))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    allocation = model.corda_record.allocation
    assert allocation["budget"] == sum(
        layer.A.numel() + layer.B.numel() for layer in uniform.layers.values()
    )
    assert 0.8 * allocation["budget"] < numbers == allocation["spent"] <= allocation["budget"]
    ranks = {name: allocation["ranks"][name] for name in parameters}
    assert any(ranks.values())
    after = trained(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_for_training(copy.deepcopy(plain), tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    written = export_lora(model if live else tmp_path / "adapter", tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / WEIGHTS_FILE)
    rows = sum(
        len(value) for key, value in tensors.items() if ".experts." in key and "lora_A" in key
    )
    assert rows == sum(2 * 4 * rank for rank in ranks.values())
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "plain")
    torch.testing.assert_close(logits(stock), after, rtol=1e-4, atol=1e-4)
    assert stock.peft_config["default"].r == written.rank


def test_an_adapter_of_experts_alone_may_be_cut(tmp_path: Path) -> None:
    base = tiny("gpt_oss")
    plain, before = copy.deepcopy(base), logits(base)
    model = init_corda(base, covariances(base), config(targets=["down_proj", "gate_up_proj"]))
    assert model.corda_record.layers.keys() == expert_parameters(plain).keys()
    after = trained(model)
    written = export_lora(model, tmp_path / "same")
    assert written.rank == 4
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "same")
    torch.testing.assert_close(logits(stock), after, rtol=1e-5, atol=1e-5)
    written = export_lora(model, tmp_path / "cut", rank=3)
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "cut")
    assert (logits(stock) - after).norm() < 2 * written.error * (after - before).norm()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout and use_dora are not possible"),
        ({"use_dora": True}, "lora_dropout and use_dora are not possible"),
        (
            {"mode": "task", "experts": "each", "freeze_a": True},
            "freeze_a, .* are not possible",
        ),
        ({"residual": "weight"}, 'residual="weight", .* not possible'),
        ({"rank": 66}, "rank 66 is not possible"),
    ],
)
def test_options_without_a_place_are_refused(options: dict[str, Any], says: str) -> None:
    base = tiny("mixtral")
    with pytest.raises(CordaError, match=says):
        init_corda(base, covariances(base), config(**options))


def test_what_cannot_be_done_with_experts_is_refused(
    tiny_model: Callable[..., nn.Module],
) -> None:
    base = tiny("mixtral")
    found = covariances(base)
    with pytest.raises(ConfigError, match="use PEFT"):
        init_corda(base, found, config(), use_peft=False)
    few = CovarianceSet({k: v for k, v in found.items() if not k.endswith("down_proj.3")})
    with pytest.raises(CovarianceError, match=r"experts\.down_proj\.3"):
        init_corda(base, few, config())
    with pytest.raises(TargetError, match="no fused experts"):
        init_corda(tiny_model("llama"), found, config())
    model = init_corda(base, found, config())
    with pytest.raises(AdapterError, match="parameter of fused experts"):
        DriftPenalty(model, found)()


def batches() -> list[Tensor]:
    return [torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(4))]


def test_excluded_experts_are_not_calibrated() -> None:
    base = tiny("mixtral")
    record = corda_adapter(base, batches(), config(exclude_modules=["experts.down_proj"])).record
    read = {name for note in record.measured["inputs"] for name in note["layers"]}
    assert any(name.endswith("gate_up_proj") for name in read)
    assert not any("down_proj" in name for name in read)


def test_a_budget_or_rank_for_experts_is_refused_before_the_model_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny("mixtral")
    monkeypatch.setattr(type(base), "forward", None)
    with pytest.raises(RankError, match="min_rank 8 needs"):
        corda_adapter(base, batches(), config(budget=8000, min_rank=8))
    targets = ["k_proj", "experts.down_proj"]  # 16 × 32, and 32 × 24 of two experts a token
    with pytest.raises(RankError, match=r"k_proj \(16 × 32\): choose one between 1 and 16"):
        corda_adapter(base, batches(), config(rank=50, targets=targets))
    with pytest.raises(RankError, match=r"down_proj \(32 × 24\): choose one between 1 and 49"):
        corda_adapter(base, batches(), config(rank=50, targets=targets[1:]))
    assert check_targets(base, config(rank=49, targets=targets[1:])).names


def test_a_report_shows_experts_by_their_parameter(tmp_path: Path) -> None:
    base = tiny("llama4_text")
    options = {"exclude_modules": left_out(base)}
    write_adapter(corda_adapter(base, covariances(base), config(**options)), tmp_path / "adapter")
    report = adapter_report("adapter", read_adapter(tmp_path / "adapter"))
    assert "rank 4 (of experts 2)" in report.title
    for name, parameter in expert_parameters(base).items():
        layer = report.layers[name]
        assert layer.shape == (4, parameter.outputs, parameter.inputs)
        assert (layer.rank, layer.spectrum is not None) == (2, True)
        assert report.input_of()[name].channels == parameter.inputs


def root(matrix: Tensor, power: float, damping: float = 0.01) -> Tensor:
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh(
        matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
    )
    return (vectors * values**power) @ vectors.T


GRADIENTS: dict[str, Any] = {"experts": "each", "sides": "both", "progress": False}
TASK: dict[str, Any] = {"rank": 4, "experts": "each", "progress": False}


def texts() -> list[Tensor]:
    """Of the task, and of the knowledge to keep."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 64, (6, 24), generator=generator) for _ in range(2)]


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.RankDeficientWarning")
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_a_task_start_is_each_experts_own(architecture: str, tmp_path: Path) -> None:
    base = tiny(architecture)
    plain, before, (task, knowledge) = copy.deepcopy(base), logits(base), texts()
    options = TASK | {"exclude_modules": left_out(base)}
    model = init_corda(base, [task], CordaConfig("task", **options), keep=[knowledge])
    assert torch.equal(logits(model), before)
    found = calibrate(plain, [task], **GRADIENTS)
    kept = calibrate(plain, [knowledge], experts="each", progress=False)
    given = corda_adapter(plain, found, CordaConfig("task", **options), keep=kept)
    for name, parameter in expert_parameters(plain).items():
        trained_ = given.layers[name]
        assert trained_.scaling == 1
        for expert, each in enumerate(expert_names(name, parameter)):
            S = root(kept[each].matrix, -0.5)
            V = torch.linalg.svd(found.gradients[each].mean.double() @ S).Vh[:2]
            rows = V @ S
            rows *= (3 * parameter.inputs) ** -0.5 / rows.square().mean().sqrt()
            A, B = trained_.A[expert].double(), trained_.B[expert].double()
            if architecture == "llama4_text":
                A, B = B.T, A.T
            assert not B.any()
            signs = (A * rows).sum(1, keepdim=True).sign()
            assert (signs * A - rows).norm() < 1e-4 * rows.norm(), each
    trained_and_served(model, plain, before, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.RankDeficientWarning")
def test_components_of_experts_are_weighted_on_both_sides() -> None:
    base, (task, _) = tiny("mixtral"), texts()
    found = calibrate(base, [task], labels="sampled", **GRADIENTS)
    adapter = corda_adapter(base, found, CordaConfig("ipm", sides="both", **TASK))
    for name, parameter in expert_parameters(base).items():
        for expert, each in enumerate(expert_names(name, parameter)):
            D = root(found.gradients[each].matrix, 0.5)
            C = root(found[each].matrix, 0.5)
            U = torch.linalg.svd(D @ parameter.weight(expert).double() @ C).U[:, :2]
            P = adapter.layers[name].B[expert, :, :2].double()
            span = torch.linalg.qr(torch.linalg.solve(D, U)).Q
            assert (P - span @ (span.T @ P)).norm() < 1e-4 * P.norm(), each
