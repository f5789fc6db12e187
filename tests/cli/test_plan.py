"""`corda-kernels plan` on configs alone: the sizes are those that can be computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from corda_kernels import calibrate
from corda_kernels.calibration.needs import calibration_needs, covariance_bytes
from corda_kernels.cli import app

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
    """The printed table by its first column."""
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    lines = [line for line in result.stdout.splitlines() if line]
    table = {line[:24].strip(): line[24:].rsplit(maxsplit=0)[0].split("  ") for line in lines}
    return {key: [cell.strip() for cell in cells if cell.strip()] for key, cells in table.items()}


def test_a_7b_model_is_planned_without_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    first = CliRunner().invoke(app, ["plan", str(tmp_path)]).stdout.splitlines()[0]
    assert first.endswith(
        "6.74 billion parameters in float16, 224 layers, 128 distinct covariances"
    )
    table = shown(tmp_path, "--samples", 256, "--seq-len", 2048, "--no-stability")
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

    tripled = shown(tmp_path, "--samples", 256, "--seq-len", 2048)
    assert tripled["covariances"][0] == f"{3 * 32 * block / gib:.1f} GiB"


def test_targets_outside_of_the_blocks_leave_one_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    table = shown(tmp_path, "--targets", "q_proj,lm_head")
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
    assert needs.covariance_bytes == covariance_bytes(model) == sum(needs.block_bytes.values())
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
