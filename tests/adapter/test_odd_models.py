"""Models whose module names or weights are not as plain as a Llama's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Calibrated
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Mamba2Config

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    export_lora,
    init_corda,
    load_for_training,
    merge,
    save_adapter,
)
from corda_kernels.adapter import CordaLinear, LayerAdapter, attach
from corda_kernels.adapter.base import describe_base
from corda_kernels.adapter.record import initial_checksum
from corda_kernels.calibration import Covariance
from corda_kernels.errors import AdapterError, LeftOutWarning, ModelError, TargetError
from corda_kernels.init import check_targets, corda_adapter
from corda_kernels.targets import target_linears

pytestmark = pytest.mark.slow

WIDTH = 12


class Vision(nn.Module):
    """A convolution, an embedding and linear layers that are all called proj."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 2)})
        self.place = nn.ModuleDict({"proj": nn.Embedding(4, WIDTH)})
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": linear()}) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch["proj"](image).flatten(2).mT + self.place["proj"].weight
        for block in self.blocks:
            x = x + block["proj"](x)
        return x


class Nested(nn.Module):
    """A layer whose whole name is the end of others'."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = linear()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": linear()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["proj"](x)
        return self.proj(x)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def covariances(names: list[str]) -> CovarianceSet:
    found = {}
    for name in names:
        x = torch.randn(64, WIDTH) * torch.logspace(0, -1, WIDTH)
        C = x.T @ x / len(x)
        found[name] = Covariance(C, 64, 1, x.abs().amax(0), torch.zeros(WIDTH).long(), 6.0)
    return CovarianceSet(found)


def config(**options: Any) -> CordaConfig:
    return CordaConfig(**({"mode": "ipm", "rank": 3, "progress": False} | options))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """After a few steps that change its outputs a lot."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


CASES: list[tuple[type[nn.Module], Any, list[str], tuple[int, ...]]] = [
    (Vision, "all-linear", ["blocks.0.proj", "blocks.1.proj"], (2, 3, 3, 3)),
    (Nested, "all-linear", ["blocks.0.proj", "blocks.1.proj", "proj"], (4, WIDTH)),
    (Nested, "proj", ["proj"], (4, WIDTH)),
]


@pytest.mark.parametrize("hold", [1.0, 8.0])
@pytest.mark.parametrize(("make", "targets", "names", "shape"), CASES)
def test_only_the_chosen_layers_are_adapted_and_all_of_it_is_kept(
    make: type[nn.Module],
    targets: Any,
    names: list[str],
    shape: tuple[int, ...],
    hold: float,
    tmp_path: Path,
) -> None:
    base, x = make(), torch.randn(shape)
    plain = copy.deepcopy(base)
    options = {"targets": targets, "hold": hold}
    if len(names) > 1:
        options |= {"budget": "r=3", "max_rank": 5}
    model = init_corda(base, covariances(names), config(**options))
    assert isinstance(model, PeftModel)
    ranks = {name: entry.rank for name, entry in model.corda_record.layers.items()}
    assert torch.equal(model(x), plain(x))
    trainable = {n.rpartition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"base_model.model.{name}" for name in ranks}
    expected = trained(model, x)(x)
    save_adapter(model, tmp_path / "adapter")
    again = load_for_training(copy.deepcopy(plain), tmp_path / "adapter")
    assert torch.equal(again(x), expected)
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter"))
    torch.testing.assert_close(stock(x), expected)
    export_lora(tmp_path / "adapter", tmp_path / "plain")
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "plain"))
    torch.testing.assert_close(stock(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_peft_is_told_full_names_or_an_expression_where_endings_say_too_much() -> None:
    vision, nested = Vision(), Nested()

    def targets(model: nn.Module, chosen: Any) -> Any:
        return describe_base(model, target_linears(model, chosen))["target_modules"]

    assert targets(vision, "all-linear") == ["blocks.0.proj", "blocks.1.proj"]
    assert targets(nested, "all-linear") == ["proj"]
    assert targets(nested, "proj") == "proj"  # as an expression it is the whole name


def test_a_model_in_which_peft_would_find_other_layers_is_refused() -> None:
    model = Nested()
    adapter = corda_adapter(model, covariances(["proj"]), config(targets="proj"))
    adapter.record.base["target_modules"] = ["proj"]  # an ending, of all three
    with pytest.raises(AdapterError, match=r"disagree on blocks\.0\.proj"):
        attach(model, adapter)


@pytest.mark.parametrize("targets", ["all-linear", "first", "second"])
def test_layers_that_share_a_weight_are_refused(targets: str) -> None:
    model = nn.ModuleDict({"first": linear(), "second": linear(), "third": linear()})
    model["second"].weight = model["first"].weight
    with pytest.raises(
        TargetError, match=r"shares its weight with (first|second): .* leave it out"
    ):
        check_targets(model, config(targets=targets))
    assert list(check_targets(model, config(targets="third")).modules) == ["third"]


@pytest.fixture
def experts() -> nn.Module:
    """A mixture whose first block is dense, with a shared expert in the second."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    routing = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        **sizes,
        **routing,
    )
    return AutoModelForCausalLM.from_config(config).eval()


PEFT_ITSELF = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@PEFT_ITSELF
def test_layers_that_peft_takes_for_experts_are_adapted_by_their_weights(
    experts: nn.Module, logits: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    """PEFT rewrites their names, in whatever form they are given. Its way around has no dropout."""
    before, base = logits(experts), copy.deepcopy(experts)
    batches = [torch.randint(3, 64, (8, 16))]
    with pytest.warns(LeftOutWarning, match="fused in one 3-D parameter"):
        model = init_corda(experts, batches, config())
    assert model.corda_record.layers.keys() == target_linears(base).keys()
    assert torch.allclose(logits(model), before, atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.requires_grad)
    save_adapter(model, tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "plain")
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert not torch.allclose(logits(stock), before, atol=1e-2)
    assert torch.equal(logits(stock), logits(model))
    exported = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    torch.testing.assert_close(logits(exported), logits(model), rtol=1e-4, atol=1e-5)

    reason = r"takes its name for a parameter of fused experts"
    with pytest.warns(LeftOutWarning, match=rf"down_proj.*{reason}.*adapts it"):
        model = init_corda(copy.deepcopy(base), batches, config(lora_dropout=0.1))
    assert {name.rpartition(".")[2] for name in model.corda_record.layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }
    named = config(targets=["q_proj", "gate_proj"], lora_dropout=0.1)
    with pytest.raises(TargetError, match=rf"gate_proj cannot be adapted.*{reason}"):
        init_corda(base, batches, named)
    with pytest.warns(LeftOutWarning, match="fused in one 3-D parameter"):
        whole = init_corda(base, batches, config(), use_peft=False)
    assert any(name.endswith("gate_proj") for name in whole.corda_record.layers)


@PEFT_ITSELF
def test_layers_that_peft_refuses_are_left_out(logits: Callable[[nn.Module], Tensor]) -> None:
    model = AutoModelForCausalLM.from_config(
        Mamba2Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=16,
            head_dim=16,
            num_heads=4,
            n_groups=1,
            chunk_size=16,
        )
    ).eval()
    before = logits(model)
    batches = [torch.randint(3, 64, (8, 16))]
    with pytest.raises(TargetError, match=r"out_proj cannot be adapted through PEFT .*Mamba"):
        init_corda(model, batches, config(targets=["in_proj", "out_proj"]))
    with pytest.warns(LeftOutWarning, match="out_proj"):
        adapted = init_corda(model, batches, config())
    assert torch.allclose(logits(adapted), before, atol=1e-5)


def test_one_layer_of_two_names_is_refused() -> None:
    model = nn.ModuleDict({"first": linear()})
    model["again"] = model["first"]
    with pytest.raises(TargetError, match="first shares its weight with again"):
        check_targets(model, config())


def test_a_device_without_decompositions_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Vision()
    # No machine of these tests has such a device.
    monkeypatch.setattr("corda_kernels.init.checks.devices", lambda _: {torch.device("mps")})
    with pytest.raises(ModelError, match="layers on mps cannot be decomposed: move the model"):
        init_corda(model, [torch.zeros(1, 3, 4, 4)], CordaConfig("ipm", rank=2))


def test_an_offloaded_model_is_refused_before_anything_runs(calibrated: Calibrated) -> None:
    from accelerate import cpu_offload

    model, _ = calibrated()
    cpu_offload(model, execution_device=torch.device("cpu"))
    calls: list[object] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(AdapterError, match=r"layer model\.layers\.0\.\S+ is offloaded.*write_adap"):
        init_corda(model, [torch.randint(3, 64, (4, 16))], config())
    assert not calls


@pytest.mark.parametrize("residual", [None, "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
def test_training_leaves_the_plain_adapter_as_it_is(
    calibrated: Calibrated, use_peft: bool, residual: Any
) -> None:
    base, found = calibrated()
    adapter = corda_adapter(base, found, config(residual=residual))

    def factors(layer: LayerAdapter) -> list[Tensor]:
        parts = [layer, layer.initial] if layer.initial else [layer]
        return [factor for part in parts for factor in (part.A, part.B)]

    before = {
        name: [factor.clone() for factor in factors(layer)]
        for name, layer in adapter.layers.items()
    }
    model = attach(base, adapter, use_peft=use_peft)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    for name, layer in adapter.layers.items():
        assert all(map(torch.equal, factors(layer), before[name]))


def test_a_model_may_read_its_layers_weights() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)
    plain, x = copy.deepcopy(model).eval(), torch.randn(2, 5, WIDTH)
    names = ["linear1", "linear2"]
    adapted = init_corda(model.eval(), covariances(names), config(targets=names), use_peft=False)
    layer = adapted.linear1
    assert isinstance(layer, CordaLinear)
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (WIDTH, WIDTH)
    torch.testing.assert_close(adapted(x), plain(x))


@pytest.mark.parametrize("residual", [None, "weight"])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.ConvergenceWarning")
def test_a_caller_may_have_autocast_on(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch, residual: Any
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # in the caller's own thread
    base, found = calibrated()
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            adapter = corda_adapter(base, found, config(method="randomized", residual=residual))
            model = attach(copy.deepcopy(base), adapter)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1 if parameter.requires_grad else 1)
            made.append((adapter, merge(model).state_dict()))
    (one, merged), (other, same) = made
    for name, layer in one.layers.items():
        assert layer.A.equal(other.layers[name].A)
        assert layer.B.equal(other.layers[name].B)
    if one.initial is not None:
        assert initial_checksum(one.initial) == initial_checksum(other.initial or {})
    assert all(torch.equal(merged[name], same[name]) for name in merged)
