"""A base that FSDP2 has sharded over ranks gets its adapter where it lies."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from fsdp_script import step
from kinds import Calibrated
from ranks import run_ranks
from safetensors.torch import load_file
from sharded_script import RUNS, config_of, text
from torch import nn

from corda_kernels import init_corda, save_adapter
from corda_kernels.adapter import read_adapter

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("sharded_script.py")


@pytest.fixture(scope="module")
def worked(
    calibrated: Calibrated,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[nn.Module, Path, str]:
    """The base, and what two ranks made of it and said."""
    base, _ = calibrated()
    out = tmp_path_factory.mktemp("sharded")
    base.save_pretrained(out / "base")
    ended = run_ranks(2, SCRIPT, out / "base", out)
    assert ended.returncode == 0, ended.stderr
    return base, out, ended.stdout


def same(folder: Path, expected: Path) -> None:
    found, whole = (load_file(each / "adapter_model.safetensors") for each in (folder, expected))
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert (found[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@pytest.mark.parametrize(("loaded", "way"), RUNS)
def test_a_sharded_base_gets_the_adapter_of_one_process_and_trains_alike(
    worked: tuple[nn.Module, Path, str], tmp_path: Path, way: str, loaded: str
) -> None:
    base, out, _ = worked
    base = copy.deepcopy(base)
    model = init_corda(base, text(), config_of(way, base, False))
    save_adapter(model, tmp_path / "start")
    step(model)
    model.save_pretrained(tmp_path / "end")
    expected = read_adapter(tmp_path / "start").record
    for rank in range(2):
        same(out / f"{loaded}-{way}-trained-{rank}", tmp_path / "end")
        folder = out / f"{loaded}-{way}-{rank}"
        same(folder, tmp_path / "start")
        record = read_adapter(folder).record
        assert record.base["sample"] == expected.base["sample"]
        assert record.calibration["tokens"] == expected.calibration["tokens"]
        assert record.stability == expected.stability


def test_what_ranks_cannot_do_is_refused_before_the_work(
    worked: tuple[nn.Module, Path, str],
) -> None:
    lines = worked[2].splitlines()
    told = [
        "ConfigError: FSDP2 has sharded the model, .* distributed=True",
        "ConfigError: a checkpoint is not possible",
        'ConfigError: sides="both" is not possible',
        "ConfigError: use_peft=False is not possible",
        'ConfigError: residual="weight" is not possible',
        r"ModelError: model\.layers\.0\.mlp\.up_proj\.weight is sharded .* without a tp_plan",
    ]
    assert lines[: len(told)] == lines[len(told) :]
    for line, pattern in zip(lines, told, strict=False):
        assert re.match(pattern, line), line
