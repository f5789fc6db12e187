"""The configurations under examples/trainers: each starts from the folder that it names, trains the
LoRA alone, and saves what `corda-kernels export` reads."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tool_order
import torch
import yaml
from fsdp_script import step
from kinds import Logits, Make
from peft import PeftModel
from torch import nn
from typer.testing import CliRunner

from corda_kernels import CordaConfig, init_corda, save_adapter
from corda_kernels.cli import app

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "trainers"


@pytest.fixture(scope="module")
def place(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that the configurations name, in bfloat16, and their start beside it."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(place)
        torch.manual_seed(0)
        tiny_model("llama", initializer_range=0.1).bfloat16().save_pretrained("corda-demo/base")
        config = CordaConfig("ipm", rank=4, budget="r=3", max_rank=8, progress=False)
        text = torch.randint(3, 64, (2, 6, 16))
        save_adapter(init_corda(tool_order.load_base("corda-demo/base"), text, config), "my-start")
    return place


@pytest.fixture
def base(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The base, in a copy of the place as the working folder."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tool_order.load_base("corda-demo/base")


def by_yaml(name: str, base: str, adapter: str) -> tuple[PeftModel, str]:
    found = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text())
    return getattr(tool_order, name)(found[base], found[adapter]), found["output_dir"]


def by_shell() -> tuple[PeftModel, str]:
    script = (CONFIGURATIONS / "ms_swift.sh").read_text().replace("\\\n", " ")
    words = shlex.split(script, comments=True)
    options = dict(zip(words[2::2], words[3::2], strict=True))
    model = tool_order.ms_swift(options["--model"], options["--adapters"])
    return model, options["--output_dir"]


def trained(model: PeftModel, base: nn.Module, logits: Logits) -> None:
    """Checks the start, takes a step, and checks what it moved."""
    mode = model.training
    assert torch.equal(logits(model), logits(base))
    model.train(mode)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    step(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name
        assert ".lora_" not in name or parameter.dtype == torch.float32, name


def exported(model: PeftModel, folder: str, base: nn.Module, logits: Logits) -> None:
    """Checks what the folder, once exported, makes of the base."""
    result = CliRunner().invoke(app, ["export", folder, "my-lora"], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    ours, expected = PeftModel.from_pretrained(base.float(), "my-lora"), logits(model.float())
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("name", ["axolotl", "llama_factory", "ms_swift"])
def test_a_trainers_run_starts_from_the_folder_and_its_own_is_exported(
    base: nn.Module, logits: Logits, name: str
) -> None:
    if name == "axolotl":
        model, out = by_yaml(name, "base_model", "lora_model_dir")
    elif name == "llama_factory":
        model, out = by_yaml(name, "model_name_or_path", "adapter_name_or_path")
    else:
        model, out = by_shell()
    trained(model, base, logits)
    only = {"selected_adapters": ["default"]} if name == "ms_swift" else {}
    model.save_pretrained(out, **only)
    exported(model, out, base, logits)


def test_unsloths_script_starts_from_the_folder_and_its_own_is_exported(
    base: nn.Module, logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(start: str, **options: Any) -> tuple[PeftModel, None]:
        assert options.pop("max_seq_length")
        assert options == {"load_in_4bit": False, "use_exact_model_name": True}
        return tool_order.unsloth(start), None

    def trainer(model: PeftModel, **_: object) -> SimpleNamespace:
        return SimpleNamespace(train=lambda: trained(model, base, logits))

    stubs = {
        "unsloth": {"FastLanguageModel": SimpleNamespace(from_pretrained=from_pretrained)},
        "trl": {"SFTConfig": dict, "SFTTrainer": trainer},
        "datasets": {"load_dataset": lambda *_, **__: None},
    }
    for name, attributes in stubs.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**attributes))  # type: ignore[arg-type]
    monkeypatch.setattr("sys.argv", ["unsloth_sft.py", "my-start", "my-chats.jsonl", "my-run"])
    scope = runpy.run_path(str(CONFIGURATIONS / "unsloth_sft.py"))
    exported(scope["model"], "my-run", base, logits)


def test_llama_factorys_data_set_is_described() -> None:
    named = yaml.safe_load((CONFIGURATIONS / "llama_factory.yaml").read_text())["dataset"]
    assert named in json.loads((CONFIGURATIONS / "dataset_info.json").read_text())
