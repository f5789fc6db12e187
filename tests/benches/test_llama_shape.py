from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_shape
import pytest
import torch

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(options: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        small = "--device cpu --layers 3 --hidden 64 --samples 2 --seq-len 16 --rank 2"
        monkeypatch.setattr(sys, "argv", f"llama_shape.py {small} {options} --json {out}".split())
        llama_shape.main()
        return json.loads(out.read_text())

    return run


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "way"), [("", "one pass"), ("--memory-limit 200000", "block by block")]
)
def test_every_part_is_measured_in_one_pass_or_block_by_block(
    measured: Any, options: str, way: str
) -> None:
    results = measured(options)
    assert results["way"] == way
    assert results["tokens"] == 32
    assert list(results["parts"]) == ["forward", "calibration", "initialisation"]
    assert all(part["seconds"] > 0 for part in results["parts"].values())
    # Per block three inputs of 64 channels and one of 172.
    assert results["covariance_bytes"] == 3 * 4 * (3 * 64**2 + 172**2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pefts_corda_beside_ours(measured: Any) -> None:
    parts = measured("--layers 1 --dtype float32 --peft")["parts"]
    assert list(parts) == ["forward", "calibration", "initialisation", "peft"]
    assert {"calibration", "decomposition"} <= parts["initialisation"]["stages"].keys()


def test_what_is_done_is_written_before_the_next_part(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_shape, "init_corda", failing)
    with pytest.raises(KeyboardInterrupt):
        measured("")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert list(kept["parts"]) == ["forward", "calibration"]


def test_the_default_has_the_widths_of_llama_2_7b() -> None:
    model = llama_shape.make_model(1, 4096, torch.bfloat16, torch.device("meta"))
    layer = model.model.layers[0]
    assert tuple(layer.self_attn.q_proj.weight.shape) == (4096, 4096)
    assert tuple(layer.self_attn.k_proj.weight.shape) == (4096, 4096)
    assert tuple(layer.mlp.gate_proj.weight.shape) == (11008, 4096)
    assert tuple(layer.mlp.down_proj.weight.shape) == (4096, 11008)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_weights_are_random_and_the_same_every_time() -> None:
    one, other = (llama_shape.make_model(1, 64, torch.float32, CPU) for _ in range(2))
    weight = one.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)
    assert weight.std() > 0.01
