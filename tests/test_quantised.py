"""Bases quantised by bitsandbytes, torchao or compressed-tensors: adapters, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import pairs
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig as PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from corda_kernels import (
    CordaConfig,
    DriftPenalty,
    calibrate,
    calibrate_blocks,
    export_lora,
    init_corda,
    load_for_training,
    load_model,
    merge,
    save_adapter,
)
from corda_kernels.adapter import adapter_of
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.errors import AdapterError, CordaWarning, TargetError
from corda_kernels.init import check_targets, layers
from corda_kernels.linears import is_packed, is_quantised, linear_shape, linear_weight
from corda_kernels.peft_corda import preprocess_corda
from corda_kernels.planning import subspace_stability
from corda_kernels.targets import target_linears

pytestmark = pytest.mark.slow

KINDS = ["4bit", "8bit", "torchao"]
# Of logits, relative: eight bits round the inputs as well, to float16 first.
ALLOWED = {"4bit": 1e-5, "8bit": 3e-2, "torchao": 1e-5}
# By which a layer of bitsandbytes knows that its CPU has AVX512-BF16.
PACKS = "support_avx512bf16_for_cpu"


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny_model("llama", initializer_range=0.1, **sizes).save_pretrained(path)
    return path


def load(folder: Path, kind: str, *, double: bool = False) -> nn.Module:
    pytest.importorskip("torchao" if kind == "torchao" else "bitsandbytes")
    options: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else these libraries could do
        if kind == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig

            options = TorchAoConfig(Int8WeightOnlyConfig())
        elif kind == "4bit":
            options = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.float32,
            )
        else:
            options = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options).eval()
    for module in model.modules():
        if hasattr(module, PACKS):
            # Packing, which some CPUs do, has tests of its own below.
            setattr(module, PACKS, False)
    return model


def batches() -> Tensor:
    return torch.randint(3, 64, (6, 4, 24), generator=torch.Generator().manual_seed(1))


def config(mode: str = "kpm", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"rank": 4, "progress": False} | options))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=batches()[0]).logits


def close(found: Tensor, expected: Tensor, kind: str) -> bool:
    return float((found - expected).norm() / expected.norm()) <= ALLOWED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_layers_multiply_by(folder: Path, kind: str) -> None:
    linears = target_linears(load(folder, kind))
    assert len(linears) == 14
    for module in linears.values():
        assert is_quantised(module)
        weight = linear_weight(module)
        assert weight.is_floating_point()
        assert tuple(weight.shape) == linear_shape(module)
        x = torch.randn(5, weight.shape[1])
        for _ in range(2):  # after the first call eight bits keep their scales elsewhere
            assert close(module(x).detach(), x @ linear_weight(module).float().T, kind)


@pytest.mark.parametrize(("kind", "mode", "use_peft"), pairs(KINDS, ["ipm", "kpm"], [True, False]))
def test_an_adapter_leaves_the_outputs_as_they_were_and_is_trained(
    folder: Path, tmp_path: Path, kind: str, mode: str, use_peft: bool
) -> None:
    model = load(folder, kind)
    before = logits(model)
    adapted = init_corda(model, batches(), config(mode), use_peft=use_peft)
    assert close(logits(adapted), before, kind)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 28
    adapted(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.05 * parameter.grad / parameter.grad.norm().clamp_min(1e-6)
    after = logits(adapted)
    assert not close(after, before, kind)
    save_adapter(adapted, tmp_path / "adapter")
    again = load_for_training(load(folder, kind), tmp_path / "adapter", use_peft=use_peft)
    assert close(logits(again), after, kind)
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    plain = PeftModel.from_pretrained(load(folder, kind), tmp_path / "lora")
    assert close(logits(plain), after, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_those_of_the_unpacked_weights(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    covariances = calibrate(model, batches(), progress=False)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, module in target_linears(plain).items():
            module.weight.copy_(linear_weight(model.get_submodule(name)))
    quantised, unpacked = (
        adapter_of(init_corda(base, covariances, config(), use_peft=False))
        for base in (model, plain)
    )
    for name, layer in quantised.layers.items():
        expected = unpacked.layers[name]
        for found, other in ((layer.A.T, expected.A.T), (layer.B, expected.B)):
            torch.testing.assert_close(projector(found), projector(other), rtol=1e-4, atol=1e-5)


def projector(columns: Tensor) -> Tensor:
    """Onto the span of four columns; the others of an untrained factor are 0."""
    U = torch.linalg.svd(columns, full_matrices=False).U[:, :4]
    return U @ U.T


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_model_is_that_of_its_weights(folder: Path, kind: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    asked = config(budget="2%")
    budgets = [check_targets(model, asked).parameters for model in (load(folder, kind), plain)]
    assert budgets[0] == budgets[1]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_penalties(folder: Path, tmp_path: Path, kind: str) -> None:
    model = load(folder, kind)
    checkpoint = CalibrationCheckpoint(tmp_path / "sums", every=96)
    covariances = calibrate(model, batches(), checkpoint=checkpoint, progress=False)
    adapted = init_corda(model, covariances, config())
    penalty = DriftPenalty(adapted, covariances)
    assert float(penalty().detach()) == 0
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert float(penalty().detach()) > 0


def test_numbers_of_eight_bits_without_their_scales_are_refused() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TargetError, match="packed weight"):
        linear_weight(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_is_made_of_weights_is_made_of_quantised_ones(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    covariances = calibrate(model, batches(), progress=False)
    blocks: dict[str, Any] = {}
    for part in calibrate_blocks(model, batches(), progress=False):
        blocks |= dict(part)
    assert blocks.keys() == covariances.keys()
    first, second = (calibrate(model, batches()[half::2], progress=False) for half in range(2))
    found = subspace_stability(target_linears(model), first, second, rank=4, progress=False)
    assert len(found.layers) == 14
    adapted = init_corda(model, covariances, config(budget="r=4"))
    assert logits(adapted).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_passes_between_a_base_and_its_quantised_self(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    save_adapter(init_corda(base, batches(), config()), tmp_path / "of-base")
    quantised = load(folder, kind)
    before = logits(quantised)
    assert close(logits(load_for_training(quantised, tmp_path / "of-base")), before, kind)
    save_adapter(init_corda(load(folder, kind), batches(), config()), tmp_path / "of-quantised")
    base = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(base)
    merged = merge(load_for_training(base, tmp_path / "of-quantised"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_no_more_weights_are_unpacked_at_a_time_than_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, "4bit")
    covariances = calibrate(model, batches(), progress=False)
    modules = target_linears(model)
    every = list(layers._loaded_together(modules, covariances))
    assert [len(names) for names in every] == [14]
    of_one_block = sum(4 * math.prod(linear_shape(module)) for module in modules.values()) // 2
    monkeypatch.setattr(layers, "_UNPACKED_BYTES", of_one_block)
    parts = list(layers._loaded_together(modules, covariances))
    assert [len(names) for names in parts] == [7, 7]
    assert sorted(name for names in parts for name in names) == sorted(modules)
    monkeypatch.setattr(layers, "_UNPACKED_BYTES", 1)
    assert [len(names) for names in layers._loaded_together(modules, covariances)] == [
        3,
        1,
        2,
        1,
    ] * 2


def test_another_base_is_still_told_apart(
    folder: Path, tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    save_adapter(init_corda(load(folder, "4bit"), batches(), config()), tmp_path / "adapter")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(1)
    other = tiny_model("llama", initializer_range=0.1, **sizes)
    with pytest.raises(AdapterError, match="differ"):
        load_for_training(other, tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_what_writes_weights_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    model = load(folder, kind)
    with pytest.raises(TargetError, match=r"q_proj is quantised .*residual=None"):
        init_corda(model, batches(), config(residual="weight"))
    base = AutoModelForCausalLM.from_pretrained(folder)
    save_adapter(init_corda(base, batches(), config(residual="weight")), tmp_path / "weight")
    with pytest.raises(TargetError, match=r"quantised .*load the base in a floating dtype"):
        load_for_training(model, tmp_path / "weight")
    runs: list[int] = []
    theirs = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        init_lora_weights="corda",
        corda_config=PeftConfig(corda_method="kpm"),
    )
    with pytest.raises(TargetError, match="init_corda, which leaves the base as it is"):
        preprocess_corda(model, theirs, lambda: runs.append(1))
    assert not runs
    for use_peft in (True, False):
        adapted = init_corda(load(folder, kind), batches(), config(), use_peft=use_peft)
        with pytest.raises(TargetError, match=r"quantised .*export_lora"):
            merge(adapted)


@pytest.fixture(params=[False, True], ids=["scales", "quantised scales"])
def packing(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], nn.Module]:
    """Loads the model in four bits as a CPU with AVX512-BF16 has it, whose kernel is emulated."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def product(A: Tensor, B: Tensor, out: Tensor | None = None, state: Any = None) -> Tensor:
        weight, unpacked = functional._convert_weight_packed_for_cpu_inverse(
            B.clone(), copy.copy(state)
        )
        if unpacked.absmax.ndim == 2:
            unpacked.absmax = unpacked.absmax.T.reshape(-1).float()
        return A @ functional.dequantize_4bit(weight, unpacked).to(A).T

    monkeypatch.setattr(functional, "gemv_4bit", product)

    def load_packing() -> nn.Module:
        model = load(folder, "4bit", double=request.param)
        for module in target_linears(model).values():
            setattr(module, PACKS, True)
        return model

    return load_packing


def test_the_emulated_cpu_packs_at_the_first_pass(packing: Callable[[], nn.Module]) -> None:
    model = packing()
    true = {name: linear_weight(each).clone() for name, each in target_linears(model).items()}
    expected = logits(load_like(model))
    found = logits(model)
    assert all(is_packed(module) for module in target_linears(model).values())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    for name, module in target_linears(model).items():
        weight = linear_weight(module)
        assert (weight - true[name]).norm() <= 3e-3 * true[name].norm()
        assert not is_packed(module)


def load_like(model: nn.Module) -> nn.Module:
    """The same weights, never to be packed."""
    other = copy.deepcopy(model)
    for module in target_linears(other).values():
        setattr(module, PACKS, False)
    return other


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_calibrating_packs_nothing(
    folder: Path, packing: Callable[[], nn.Module], tmp_path: Path, mode: str
) -> None:
    model = packing()
    expected = adapter_of(init_corda(load_like(packing()), batches(), config(mode)))
    adapted = init_corda(model, batches(), config(mode))
    for module in target_linears(packing()).values():
        assert getattr(module, PACKS)
    assert sum(getattr(module, PACKS, False) for module in adapted.modules()) == 14
    for name, layer in adapter_of(adapted).layers.items():
        assert torch.equal(layer.A, expected.layers[name].A)
        assert torch.equal(layer.B, expected.layers[name].B)
    adapted.train()
    adapted(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    gradients = [each.grad for each in adapted.parameters() if each.requires_grad]
    assert len(gradients) == 28
    assert all(bool(gradient.any()) for gradient in gradients)
    save_adapter(adapted, tmp_path)
    load_for_training(packing(), tmp_path)


def test_weights_that_were_packed_before_are_unpacked_with_a_note(
    folder: Path, packing: Callable[[], nn.Module], tmp_path: Path
) -> None:
    save_adapter(init_corda(load(folder, "4bit"), batches(), config()), tmp_path)
    for use in (
        lambda model: init_corda(model, batches(), config()),
        lambda model: load_for_training(model, tmp_path),
    ):
        model = packing()
        logits(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = use(model)
        (note,) = [str(each.message) for each in caught if each.category is CordaWarning]
        assert "packed the weights of 14 layer(s)" in note
        adapted.train()
        adapted(input_ids=batches()[0], labels=batches()[0]).loss.backward()
        assert all(bool(each.grad.any()) for each in adapted.parameters() if each.requires_grad)


# compressed-tensors' schemes of weights, and the formats in which they are stored.
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
    ),
}


@pytest.fixture(scope="module", params=SCHEMES)
def compressed(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint as llm-compressor writes it, of the base's weights."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    form, weights = SCHEMES[request.param]
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    scheme = QuantizationScheme(**group)
    stored = {}
    for name, W in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = W
            continue
        largest = 448.0  # of float8_e4m3fn; 6 of four bits
        parts = {"weight": W, "weight_scale": W.abs().amax(1, keepdim=True) / largest}
        if request.param == "NVFP4":
            of_all = 6 * largest / W.abs().max().reshape(1)
            scales = W.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * of_all
            parts["weight_scale"] = scales.to(torch.float8_e4m3fn).float()
            parts["weight_global_scale"] = of_all
        packed = compressors.BaseCompressor.get_value_from_registry(form).compress(parts, scheme)
        stored |= {name.removesuffix("weight") + part: value for part, value in packed.items()}
    path = tmp_path_factory.mktemp(request.param)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_compressed_tensors_are_dequantised_as_they_are_loaded(
    folder: Path, compressed: Path, tmp_path: Path
) -> None:
    model = load_model(compressed)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in target_linears(model).items():
        W, true = linear_weight(module).detach(), plain.get_submodule(name).weight.detach()
        assert W.is_floating_point()
        # Eight bits have three of mantissa, four have one.
        most = 0.04 if compressed.name.startswith("FP8") else 0.15
        assert most / 8 < float((W - true).norm() / true.norm()) < most
    before = logits(model)
    adapted = init_corda(model, batches(), config("ipm"))
    torch.testing.assert_close(logits(adapted), before)
    save_adapter(adapted, tmp_path / "adapter")
    again = load_for_training(load_model(compressed), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), before)


@pytest.mark.filterwarnings("ignore")  # of what else that library could do
def test_compressed_tensors_that_stay_so_are_refused_before_the_work(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(
        TargetError, match=r"layers\.0\.self_attn\.q_proj .* CompressedTensorsConfig\(dequantize=T"
    ):
        init_corda(model, batches(), config())
    assert not ran


def test_what_another_library_has_packed_is_refused(folder: Path) -> None:
    class QuantLinear(nn.Module):
        qweight = torch.zeros(2, 2, dtype=torch.int32)

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj = QuantLinear()
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.up_proj .*QuantLinear, as of GPTQ"):
        init_corda(model, batches(), config())
