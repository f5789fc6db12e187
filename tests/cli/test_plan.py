"""`corda-kernels plan` on configs alone: the sizes are those that can be computed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from corda_kernels import calibrate
from corda_kernels.calibration import calibrate_blocks
from corda_kernels.calibration.needs import calibration_needs, covariance_bytes
from corda_kernels.cli import app
from corda_kernels.errors import ModelError
from corda_kernels.init import CalibrationPlan, covariance_stages
from corda_kernels.models import load_skeleton
from corda_kernels.outputs import format_bytes

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def shown(*arguments: object) -> dict[str, list[str]]:
    """The printed lines: cells, which stand two spaces apart, by the first of them."""
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines() if line]
    return {first: cells for first, *cells in rows}


@pytest.mark.slow
def test_a_7b_model_is_planned_without_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    tripled = shown(tmp_path, "--stability")  # 256 sequences of 2,048 tokens
    about = "6.74 billion parameters in float16, 224 layers, 128 distinct covariances"
    assert next(iter(tripled)).endswith(about)
    table = shown(tmp_path, "--samples", 256, "--seq-len", 2048)
    block = 4 * (3 * 4096**2 + 11008**2)
    hidden = 256 * 2048 * 4096 * 2
    weights = 2 * 6_738_415_616
    gib = 2.0**30
    assert table["weights"] == [f"{weights / gib:.1f} GiB"] * 2
    assert table["covariances"] == [f"{32 * block / gib:.1f} GiB", f"{block * 1024 / gib:.1f} MiB"]
    assert table["hidden states"] == ["0 B", f"{hidden / gib:.1f} GiB"]
    assert table["together"] == [
        f"{(weights + 32 * block) / gib:.1f} GiB",
        f"{(weights + block + hidden) / gib:.1f} GiB",
    ]
    assert table["forward passes"] == ["1", "1"]
    products = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    # Attention's two products over 2,048 positions; counters take them as full squares.
    attention = 32 * 2 * 2 * 2048 * 4096
    expected = 256 * 2048 * (products + attention)
    assert float(table["FLOPs: forward"][0]) == pytest.approx(expected, rel=0.05)
    covariances = 256 * 2048 * 32 * (3 * 4096 * 4097 + 11008 * 11009)
    assert float(table["FLOPs: covariances"][1]) == pytest.approx(covariances, rel=0.05)
    assert tripled["covariances"][0] == f"{3 * 32 * block / gib:.1f} GiB"


@dataclass(frozen=True)
class Mixture:
    """A mixture by its public values, and what follows from them by hand.

    Attributes:
        config: of transformers.
        linears: channels of the distinct inputs of a layer, but for those of its experts.
        experts: how many a layer has, to how many a token is sent, and the channels of what they
            read: hidden states, and between their projections.
        dense: layers without experts, and the channels of their inputs.
        fits: the ways in which 80 GB hold weights and covariances.
    """

    config: dict[str, Any]
    linears: list[int]
    experts: tuple[int, int, int, int]
    fits: str
    dense: tuple[int, list[int]] = (0, [])

    def covariances(self) -> tuple[int, int]:
        """Bytes of all, and of a layer with experts."""
        count, _, hidden, inner = self.experts
        layer = 4 * (sum(width**2 for width in [*self.linears, hidden]) + count * inner**2)
        dense, widths = self.dense
        routed = self.config["num_hidden_layers"] - dense
        return routed * layer + dense * 4 * sum(width**2 for width in widths), layer

    def products(self) -> int:
        """Operations that a token adds to them."""
        _, active, hidden, inner = self.experts
        dense, widths = self.dense
        routed = self.config["num_hidden_layers"] - dense
        read = [*self.linears, hidden, *active * [inner]]
        return sum(
            layers * sum(width * (width + 1) for width in of)
            for layers, of in ((routed, read), (dense, widths))
        )


_APART = {"tie_word_embeddings": False}
MIXTURES = {
    "Qwen3-30B-A3B": Mixture(
        {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048}
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
        | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128, **_APART},
        [2048, 4096],
        (128, 8, 2048, 768),
        "block by block, offloaded",
    ),
    "Mixtral-8x7B": Mixture(
        {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096}
        | {"intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, **_APART},
        [4096, 4096],
        (8, 2, 4096, 14336),
        "offloaded",
    ),
    "gpt-oss-120b": Mixture(
        {"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880}
        | {"intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4}
        | {"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8}
        | {"head_dim": 64, **_APART},
        [2880, 64 * 64],
        (128, 4, 2880, 2880),
        "offloaded",
    ),
    "DeepSeek-V3": Mixture(
        {"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168}
        | {"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_shared_experts": 1}
        | {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
        | {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128}
        | {"first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512}
        | {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, **_APART},
        # Attention's two projections down read one tensor, as do the shared expert's gate and up.
        [7168, 1536, 512, 128 * 128, 7168, 2048],
        (256, 8, 7168, 2048),
        "offloaded",
        (3, [7168, 1536, 512, 128 * 128, 7168, 18432]),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_planned_from_their_public_values(name: str, tmp_path: Path) -> None:
    mixture = MIXTURES[name]
    values = {**mixture.config, "dtype": "bfloat16"}
    config = AutoConfig.for_model(**values)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    table = shown(tmp_path, "--experts", "shared", "--memory", "80GB")
    whole, layer = mixture.covariances()
    cells = table["covariances"]
    assert cells == [format_bytes(whole), format_bytes(layer), format_bytes(layer)]
    products = 256 * 2048 * mixture.products()
    assert float(table["FLOPs: covariances"][0]) == pytest.approx(products, rel=0.05)
    assert f"74.5 GiB hold weights and covariances: {mixture.fits}" in table
    documented = (Path(__file__).parents[2] / "docs/design/experts.md").read_text()
    how = "block by block" if "block" in mixture.fits else "block by block, weights offloaded"
    row = [name, table["weights"][0], *cells[:2], how]
    assert f"| {' | '.join(row)} |" in documented


@pytest.mark.parametrize("stability", [False, True])
def test_the_limit_that_is_advised_holds_a_block(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, stability: bool
) -> None:
    model = tiny_model("llama", intermediate_size=333)
    model.config.save_pretrained(tmp_path)
    sets = 3 if stability else 1
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    largest = sets * covariance_bytes(model)[1]
    options = ["--stability"] if stability else []
    options += ["--dtype", "float32", "--samples", 4, "--seq-len", 8]
    table = shown(tmp_path, *options, "--memory", weights + largest)
    command = "calibrate" if stability else "init"
    assert f"next: corda-kernels {command} --memory-limit {largest}" in table
    assert table["hidden states"] == ["0 B", *2 * [f"{2 * 4 * 8 * 4 * 32 / 1024:.1f} KiB"]]
    none = shown(tmp_path, *options, "--memory", 9)
    assert "9 B: none of these ways fits" in none
    remedy = "leave --stability out" if stability else "leave layers out"
    assert any(line.startswith(f"next: {remedy}") for line in none)
    plan = CalibrationPlan(memory_limit=largest, stability=stability, progress=False)
    assert len(list(covariance_stages(model, 2 * [torch.ones(1, 4).long()], plan))) == 2


def test_targets_outside_of_the_blocks_leave_one_pass(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    table = shown(tmp_path, "--targets", "q_proj,lm_head", "--seq-len", 8)
    assert table["covariances"][1:] == ["-"]
    assert any(key.startswith("block by block: not") for key in table)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3"])
def test_needs_are_those_of_the_calibration(
    tiny_model: Callable[..., nn.Module], architecture: str
) -> None:
    model = tiny_model(architecture)
    found = calibrate(model, [torch.ones(1, 4).long()], progress=False)
    needs = calibration_needs(model, seq_len=8)
    assert [names for _, names in needs.groups] == [names for _, names in found.groups()]
    matrices = [covariance.matrix for covariance, _ in found.groups()]
    assert needs.covariance_bytes == sum(4 * matrix.numel() for matrix in matrices)
    assert needs.covariance_bytes == sum(needs.block_bytes.values())
    largest = max(needs.block_bytes.values())
    assert covariance_bytes(model) == (needs.covariance_bytes, largest)
    assert needs.hidden_bytes == 4 * 32
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sequences_that_the_model_cannot_run_are_told(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    for length, refused in ((64, False), (65, True)):
        shown = CliRunner().invoke(app, ["plan", str(tmp_path), "--seq-len", str(length)]).stdout
        assert ("the model has 64 positions" in shown) == refused
        assert ("lower --seq-len to 64" in shown) == refused


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Models that take no finished mask, have routed experts, or whose blocks return more.
ODD: dict[str, dict[str, int]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "mamba": {"state_size": 4},
    "gptj": {"rotary_dim": 4},
    "mixtral": {"intermediate_size": 48, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("architecture", ODD)
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_a_skeleton_needs_what_the_model_does(architecture: str, tmp_path: Path) -> None:
    if architecture == "opt":  # before, it looks at the values of its mask
        pytest.importorskip("transformers", minversion="5.18")
    config = AutoConfig.for_model(architecture, **TINY | ODD[architecture])
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    batch = torch.arange(5, 9)[None]
    options: Any = {"on_unseen": "skip", "progress": False}  # Mamba reads a weight by itself
    found = calibrate(model, [batch], **options)
    needs = calibration_needs(load_skeleton(tmp_path, dtype="float32"), seq_len=8)
    groups = {frozenset(names) for _, names in needs.groups}
    assert groups >= {frozenset(names) for _, names in found.groups()}
    assert sum(map(len, groups)) == len(found) + len(found.left_out.keys() & set().union(*groups))
    assert needs.hidden_bytes == 4 * 32
    assert needs.forward_flops > 0
    assert needs.block_bytes is not None
    assert not needs.obstacle
    assert len(list(calibrate_blocks(model, [batch], **options))) == 2


def test_a_multimodal_models_hidden_states_are_its_text_models(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 64, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 2}
    vision = sizes | {"hidden_size": 16, "image_size": 28, "patch_size": 14}
    AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    ).save_pretrained(tmp_path)
    skeleton = load_skeleton(tmp_path, dtype="float32")
    assert (
        calibration_needs(skeleton, r"model\.language_model\..*", seq_len=8).hidden_bytes == 4 * 32
    )


def test_a_model_that_does_not_run_without_weights_is_refused(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    skeleton = load_skeleton(tmp_path)
    skeleton.model.norm.register_forward_pre_hook(lambda module, args: args[0].sum().item())
    with pytest.raises(ModelError, match="LlamaForCausalLM does not run without its weights"):
        calibration_needs(skeleton)
