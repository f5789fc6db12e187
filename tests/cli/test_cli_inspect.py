"""`corda-kernels inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_text import SMALL

from corda_kernels import CovarianceSet
from corda_kernels.adapter import read_adapter
from corda_kernels.report.content import adapter_report

pytestmark = pytest.mark.slow


def test_calibrate_then_inspect_then_init(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    file, adapter = tmp_path / "sub" / "covariances.safetensors", tmp_path / "adapter"
    shown = invoke("calibrate", place / "model", file, "--data", place / "text.txt", *SMALL)
    assert f"{file}: 14 layers, 8 distinct covariances, 256 tokens" in shown
    covariances = CovarianceSet.load(file)

    shown = invoke("inspect", file)
    table = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert table["layer"][:3] == ["layer", "tokens", "in"]
    for name, covariance in covariances.items():
        assert table[name][1:3] == ["256", str(len(covariance.matrix))]
        assert table[name][-1] in ("stable", "fair", "unstable")
    assert shown.splitlines()[-1].startswith("samples: ")
    assert "enough samples" in shown.splitlines()[-1]

    shown = invoke("init", place / "model", adapter, "--mode", "kpm", "--cov", file, "--rank", 4)
    assert "KPM adapter of rank 4" in shown
    shown = invoke("inspect", adapter)
    assert shown.startswith(
        f"{adapter}: KPM adapter of rank 4 for 14 layers of {place / 'model'} "
        "(hold 1, damping 0.01)\n"
    )
    table = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    for name in covariances:
        assert table[name][1:3] == ["256", "4"]
    assert shown.splitlines()[-1].startswith("samples: ")
    assert "judged at rank" not in shown


def test_fused_experts_are_shown_by_parameter(
    tiny_model: Callable[..., Any],
    save_tokenizer: Callable[[Path], None],
    invoke: Callable[..., str],
    place: Path,
    tmp_path: Path,
) -> None:
    model, file = tmp_path / "model", tmp_path / "covariances.safetensors"
    tiny_model("qwen3_moe").save_pretrained(model)
    save_tokenizer(model)
    # Names take experts in without --experts, and "all-linear" would warn of the routers.
    options = ("--targets", r"model\..*", "--data", place / "text.txt", *SMALL)
    shown = invoke("calibrate", model, file, *options)
    # q, k and v share one; o_proj; the experts' hidden states, and four down projections.
    assert f"{file}: 10 layers and inputs of 8 experts, 14 distinct covariances" in shown
    shown = invoke("inspect", file)
    assert "10 layers and inputs of 8 experts, 14 covariances" in shown
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    covariances = CovarianceSet.load(file)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        tokens = [covariances[f"{name}.{expert}"].tokens for expert in range(4)]
        assert sum(tokens) == 2 * 256  # each goes to two experts
        assert rows[name][1:] == [str(min(tokens)), "to", str(max(tokens)), "4", "0"]
        assert f"{name}.0" not in rows


def test_an_exported_lora_is_shown_for_what_it_is(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    adapter, lora = tmp_path / "adapter", tmp_path / "lora"
    text = ("--data", place / "text.txt", *SMALL)
    invoke("init", place / "model", adapter, "--mode", "ipm", "--rank", 4, *text)
    invoke("export", adapter, lora)
    shown = invoke("inspect", lora)
    assert shown.startswith(
        f"{lora}: a LoRA of rank 8 for 14 layers of {place / 'model'}; it has no"
    )
    assert "inspect the adapter that it came from" in shown


@pytest.mark.parametrize(
    ("options", "form"),
    [(("--hold", 8), "hold 8"), (("--residual", "weight"), "residual weight")],
    ids=["hold", "weight"],
)
def test_the_form_of_an_adapter_is_shown(
    invoke: Callable[..., str], place: Path, tmp_path: Path, options: Any, form: str
) -> None:
    out = tmp_path / "out"
    data = ("--data", place / "text.txt", *SMALL, "--mode", "ipm", "--damping", 0.1)
    invoke("init", place / "model", out, *data, *options)
    assert f"({form}, damping 0.1)" in invoke("inspect", out).splitlines()[0]
    assert adapter_report("adapter", read_adapter(out)).title.endswith(f"({form}, damping 0.1)")


def test_samples_judged_at_another_rank_are_said_to_be(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    file, adapter = tmp_path / "covariances.safetensors", tmp_path / "adapter"
    invoke("calibrate", place / "model", file, "--data", place / "text.txt", *SMALL)
    options = ("--mode", "kpm", "--targets", "v_proj", "--rank", 2)
    shown = invoke("init", place / "model", adapter, "--cov", file, *options)
    verdict = next(line for line in shown.splitlines() if line.startswith("calibration: "))
    assert "of 2 layers stable" in verdict
    assert verdict.endswith("judged at rank 4)")
    assert invoke("inspect", adapter).splitlines()[-1].endswith("judged at rank 4)")
    page = dict(adapter_report("adapter", read_adapter(adapter)).summary)
    assert page["samples"].endswith("judged at rank 4)")


@pytest.mark.parametrize(
    ("note", "value"),
    [
        ("selection", {"rounds": 2}),
        ("selection", {"scores": {}}),
        ("mixture", {"files": ["a"]}),
        ("mixture", {"sources": [], "weights": [1], "normalize": "trace"}),
    ],
)
def test_a_note_that_was_altered_is_told(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    place: Path,
    tmp_path: Path,
    note: str,
    value: dict[str, Any],
) -> None:
    data = ("--data", place / "text.txt", *SMALL, "--candidates", 2)
    invoke("init", place / "model", tmp_path / "out", *data, "--mode", "ipm")
    file = tmp_path / "out" / "corda.json"
    record = json.loads(file.read_text())
    record["calibration"][note] = record["calibration"].get(note, {}) | value
    file.write_text(json.dumps(record))
    status, _, lines = command("inspect", tmp_path / "out")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: the note on the {note} was altered")


def test_inspect_says_where_stability_was_not_measured(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "covariances.safetensors"
    data = ("--data", place / "text.txt", *SMALL, "--no-stability")
    invoke("calibrate", place / "model", file, *data)
    assert invoke("inspect", file).endswith("samples: their stability was not measured\n")
