"""An adapter's files, damaged one field at a time: an AdapterError, or the adapter as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_bytes, damaged_json, damaged_tensors, header_size
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from corda_kernels import load_for_training
from corda_kernels.adapter import Adapter, read_adapter, save_adapter
from corda_kernels.adapter.folder import read_record
from corda_kernels.adapter.lora import lora_layers, read_lora
from corda_kernels.adapter.record import check_base, lora_config
from corda_kernels.errors import AdapterError

pytestmark = pytest.mark.slow

WEIGHTS, INITIAL = "adapter_model.safetensors", "corda_initial.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "planned": {"budget": "r=4", "max_rank": 6, "lora_dropout": 0.1},
    "published": {"residual": "weight"},
}
# Fields of the record by which nothing is computed. Any value of the right kind will do.
NOTES = ("calibration", "stability", "measured", "versions")
DESCRIPTIVE = (
    *("rank", "hold", "damping", "lora"),
    *("base.source", "base.quantised", "base.fan_in_fan_out", "base.task_type", "base.sample"),
    *("allocation.budget", "allocation.spent", "allocation.condition"),
    *(f"self_attn.{name}_proj.{field}" for name in "qk" for field in ("tokens", "residual")),
    *(f"self_attn.{name}_proj.sigma_{end}" for name in "qk" for end in ("max", "min")),
)
# Fields of PEFT's by which it computes something else, which the file then asks for.
OF_SCALING = ("lora_alpha", "use_rslora", "alpha_pattern")
OF_PEFT = (
    *("alora_invocation_tokens", "use_qalora", "arrow_config", "kasa_config", "use_bdlora"),
    *("velora_config", "monteclora_config", "layer_replication", "target_parameters", "lora_bias"),
    *("trainable_token_indices", "init_lora_weights"),
)


@pytest.fixture(scope="module")
def whole(
    calibrated: Callable[..., Any],
    adapt: Callable[..., nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Undamaged folders of every kind; nothing here is written to."""
    root = tmp_path_factory.mktemp("whole")
    for kind, options in KINDS.items():
        adapter = adapt(calibrated(), targets=["q_proj", "k_proj"], **options)
        save_adapter(adapter, root / kind)
    return root


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(whole: Path, kind: str, tmp_path: Path) -> Path:
    shutil.copytree(whole / kind, tmp_path / kind)
    return tmp_path / kind


def same(found: Any, expected: Any, *, scaling: bool = True) -> bool:
    """Whether layers have the same factors, and the same scaling."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].A, expected[name].A)
        and torch.equal(found[name].B, expected[name].B)
        and (found[name].scaling == expected[name].scaling or not scaling)
        for name in expected
    )


def same_adapter(found: Adapter, expected: Adapter) -> bool:
    initial = [adapter.initial or {} for adapter in (found, expected)]
    targets = [lora_config(adapter).target_modules for adapter in (found, expected)]
    return same(found.layers, expected.layers) and same(*initial) and targets[0] == targets[1]


@pytest.mark.parametrize("kind", ["planned", "published"], indirect=True)
def test_a_field_of_the_record(calibrated: Callable[..., Any], folder: Path) -> None:
    model = calibrated()[0]
    expected = read_adapter(folder)
    modules = {name: model.get_submodule(name) for name in expected.layers}
    file = folder / "corda.json"
    for path, text in damaged_json(json.loads(file.read_text())):
        file.write_text(text)
        try:
            record = read_record(folder)
            assert record is not None
            if path.startswith(NOTES):
                continue
            found = read_adapter(folder)
        except AdapterError:
            continue
        # Without an allocation there was no budget; earlier records do not name the sides.
        assert path in ("allocation", "sides") or any(
            f".{n}." in f".{path}." for n in DESCRIPTIVE
        ), path
        if path == "base.sample.0":
            with pytest.raises(AdapterError, match="weights differ"):
                check_base(record, modules)
            continue
        check_base(record, modules)
        assert same_adapter(found, expected), (path, text)


@pytest.mark.parametrize("kind", ["planned"], indirect=True)
def test_a_field_of_the_configuration(folder: Path) -> None:
    expected = lora_layers(read_lora(folder))
    file = folder / "adapter_config.json"
    for path, text in damaged_json(json.loads(file.read_text())):
        file.write_text(text)
        try:
            found = lora_layers(read_lora(folder))
        except AdapterError:
            continue
        assert same(found, expected, scaling=not path.startswith(OF_SCALING)), (path, text)
        assert all(0 < layer.scaling < torch.inf for layer in found.values())


@pytest.mark.parametrize("name", [WEIGHTS, INITIAL])
def test_a_tensor(calibrated: Callable[..., Any], folder: Path, name: str) -> None:
    file = folder / name
    if not file.exists():
        return
    expected = read_adapter(folder)
    for damage, tensors in damaged_tensors(load_file(file)):
        save_file(tensors, file)
        if damage == "extra" and name == WEIGHTS:  # as embeddings that were trained too
            assert same_adapter(read_adapter(folder), expected)
            continue
        try:
            read_adapter(folder)
        except AdapterError:
            continue
        assert damage.endswith("shorter"), damage  # which the base alone can tell
        with pytest.raises(AdapterError, match="but the adapter is for"):
            load_for_training(calibrated()[0], folder)


@pytest.mark.parametrize("name", [WEIGHTS, INITIAL, "corda.json", "adapter_config.json"])
def test_a_byte(folder: Path, name: str) -> None:
    file = folder / name
    if not file.exists():
        return
    expected = read_adapter(folder)
    contents = file.read_bytes()
    header = header_size(contents) if name.endswith(".safetensors") else len(contents)
    for damage, broken in damaged_bytes(contents, header):
        file.write_bytes(broken)
        try:
            found = read_adapter(folder)
        except AdapterError:
            continue
        scaling = name != "adapter_config.json"  # another digit is another number
        assert same(found.layers, expected.layers, scaling=scaling), damage


class Small(nn.Module):
    """Two layers that an adapter can be of."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k_proj(self.q_proj(x).tanh())


@pytest.mark.filterwarnings("ignore")
def test_a_field_of_a_foreign_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = Small().state_dict()
    x = torch.randn(3, 6)

    def base() -> nn.Module:
        model = Small()
        model.load_state_dict(state)
        return model

    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 3})
    made = get_peft_model(base(), config)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0
    made.save_pretrained(tmp_path)
    expected = made.eval()(x)
    file = tmp_path / "adapter_config.json"
    for path, text in damaged_json(json.loads(file.read_text())):
        file.write_text(text)
        try:
            found: Any = load_for_training(base(), tmp_path)
        except AdapterError:
            continue
        if not path.startswith((*OF_SCALING, *OF_PEFT)):
            assert torch.allclose(found.eval()(x), expected, atol=1e-5), (path, text)
