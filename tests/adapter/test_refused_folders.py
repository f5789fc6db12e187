"""Folders that are damaged, or put together from several adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, FIRST, INITIAL, NO_BASE, WEIGHTS, same
from kinds import Calibrated, Make
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from corda_kernels import export_lora, load_for_training
from corda_kernels.adapter import AdapterFactors, adapter_of, attach, read_adapter
from corda_kernels.adapter.published import residual
from corda_kernels.errors import AdapterError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(NO_BASE)]


def edit(folder: Path, change: Callable[[Any], object], file: str = "corda.json") -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def key(factor: str) -> str:
    return f"base_model.model.{FIRST}.lora_{factor}.weight"


RECORD_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "record cut": (
        lambda f: truncate(f / "corda.json"),
        "corda.json is truncated or not JSON .*copy it again",
    ),
    "record empty": (
        lambda f: (f / "corda.json").write_text(""),
        "corda.json is truncated or not JSON",
    ),
    "record binary": (
        lambda f: (f / "corda.json").write_bytes(b"\xff"),
        "corda.json is truncated or not JSON",
    ),
    "record a list": (lambda f: (f / "corda.json").write_text("[]"), "corda.json was altered: it"),
    "field gone": (lambda f: edit(f, lambda v: v.pop("layers")), "field 'layers' is missing"),
    "field added": (lambda f: edit(f, lambda v: v.update(x=1)), "field 'x' is missing or unknown"),
    "later format": (lambda f: edit(f, lambda v: v.update(format="2")), "has format '2'"),
    "another rank": (
        lambda f: edit(f, lambda v: v["layers"][FIRST].update(rank=5)),
        rf"{WEIGHTS} and corda.json differ in layer {FIRST} \(8 and 10\): files of different",
    ),
    "layer without fields": (
        lambda f: edit(f, lambda v: v["layers"].update({FIRST: {}})),
        f"field 'rank' is missing or unknown in {FIRST}",
    ),
    "base without fields": (lambda f: edit(f, lambda v: v["base"].clear()), "unknown in base"),
}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such adapter folder"),
    "no trained": (
        lambda f: (f / WEIGHTS).unlink(),
        f"has no {WEIGHTS}: copy it from where it was made",
    ),
    "trained pickled": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        r"load the folder with PeftModel\.from_pretrained, which also reads adapter_model\.bin",
    ),
    "trained cut": (
        lambda f: truncate(f / WEIGHTS),
        f"{WEIGHTS} is truncated or not a safetensors file .*copy it again",
    ),
    "no config": (
        lambda f: (f / CONFIG).unlink(),
        f"has no {CONFIG}: it is no adapter, or was copied in part",
    ),
    "config cut": (
        lambda f: truncate(f / CONFIG),
        f"{CONFIG} is truncated or not JSON .*copy it again",
    ),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG} was altered: it holds"),
    "no lora": (
        lambda f: edit(f, lambda v: v.update(peft_type="IA3"), CONFIG),
        "holds no LoRA, but 'IA3'",
    ),
    "config without rank": (
        lambda f: edit(f, lambda v: v.pop("r"), CONFIG),
        f"{CONFIG} was altered: r is None",
    ),
    "config of no alpha": (
        lambda f: edit(f, lambda v: v.update(lora_alpha=0), CONFIG),
        f"{CONFIG} was altered: lora_alpha is 0",
    ),
    "config of another rank": (
        lambda f: edit(f, lambda v: v.update(r=16), CONFIG),
        f"A and B do not fit each other, rank 16 and scaling 0.5 of {CONFIG}: files of diff",
    ),
    "layer without A": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(key("A"))),
        f"lacks a factor of layer {FIRST}, or its A and B ",
    ),
    "layer of two ranks": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({key("A"): torch.ones(5, 32)})),
        f"lacks a factor of layer {FIRST}, or its A and B ",
    ),
    "layer of two dtypes": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({key("A"): t[key("A")].half()})),
        f"layer {FIRST}, or its A and B do not fit each other",
    ),
    "no layers": (
        lambda f: save_file({}, f / WEIGHTS),
        "holds no factors of linear layers: files of different adapters",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(calibrated: Calibrated, folder: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    break_it(folder)
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match=message):
            load_for_training(calibrated()[0], folder, use_peft=use_peft)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)
    with pytest.raises(AdapterError, match=message):
        export_lora(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
def test_a_damaged_record_is_refused_where_it_is_read(
    calibrated: Calibrated, folder: Path, damage: str
) -> None:
    break_it, message = RECORD_DAMAGE[damage]
    break_it(folder)
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match=message):
            load_for_training(calibrated()[0], folder, use_peft=use_peft)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)
    export_lora(folder, folder.parent / "out")


def test_a_layer_that_is_gone_is_noticed_by_the_record(
    calibrated: Calibrated, folder: Path
) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: [t.pop(key(factor)) for factor in "AB"])
    with pytest.raises(AdapterError, match=rf"differ in layer {FIRST} \(None and 8\)"):
        load_for_training(calibrated()[0], folder)


INITIAL_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (
        lambda f: (f / INITIAL).unlink(),
        f"has no {INITIAL}: it holds the part of the base that its adapter has taken over; copy it",
    ),
    "cut": (
        lambda f: truncate(f / INITIAL),
        f"{INITIAL} is truncated or not a safetensors file .*copy it again",
    ),
    "layer without B": (
        lambda f: edit_tensors(f / INITIAL, lambda t: t.pop(key("B"))),
        f"lacks a factor of layer {FIRST}",
    ),
    "layer gone": (
        lambda f: edit_tensors(f / INITIAL, lambda t: [t.pop(key(factor)) for factor in "AB"]),
        f"{INITIAL} and {WEIGHTS} differ in layer {FIRST} .*: files of different adapters, or",
    ),
    "another shape": (
        lambda f: edit_tensors(f / INITIAL, lambda t: t.update({key("A"): torch.ones(4, 5)})),
        f"{INITIAL} and {WEIGHTS} differ in layer {FIRST}",
    ),
}


@pytest.mark.parametrize("damage", INITIAL_DAMAGE)
def test_damaged_initial_factors_are_refused_and_the_base_left_alone(
    calibrated: Calibrated, published: Path, damage: str
) -> None:
    break_it, message = INITIAL_DAMAGE[damage]
    break_it(published)
    base, _ = calibrated()
    before = copy.deepcopy(base.state_dict())
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match=message):
            load_for_training(base, published, use_peft=use_peft)
    with pytest.raises(AdapterError, match=message):
        export_lora(published, published.parent / "out")
    assert not (published.parent / "out").exists()
    assert same(dict(base.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (None, AdapterError),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_peft_refuses_leaves_the_base_as_it_was(
    calibrated: Calibrated,
    published: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException | None,
    error: type[BaseException],
) -> None:
    base, _ = calibrated()
    before, kinds = copy.deepcopy(base.state_dict()), list(map(type, base.modules()))
    attributes = vars(base).keys() - {"peft_config"}
    if raised is None:  # PEFT finds out when layers are wrapped
        edit(published, lambda v: v.update(bias="nonsense"), CONFIG)
    else:

        def failing(self: Any, *arguments: Any, **options: Any) -> None:
            raise raised

        monkeypatch.setattr(PeftModel, "load_adapter", failing)
    with pytest.raises(error):
        load_for_training(base, published)
    assert list(map(type, base.modules())) == kinds
    assert same(dict(base.state_dict()), dict(before))
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not hasattr(base.config, "corda_residual")
    assert vars(base).keys() == attributes
    monkeypatch.undo()
    edit(published, lambda v: v.update(bias="none"), CONFIG)
    load_for_training(base, published)


def test_no_layer_loses_its_part_where_memory_runs_out_for_one(
    calibrated: Calibrated, adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = narrow = calibrated(intermediate_size=16)
    adapter = adapter_of(adapt(copy.deepcopy(narrow), use_peft=False, residual="weight"))
    before, kinds = copy.deepcopy(base.state_dict()), list(map(type, base.modules()))

    def failing(weight: Tensor, factors: AdapterFactors) -> Tensor:
        if weight.shape == (32, 32):  # the largest, and none is the first
            raise torch.OutOfMemoryError("full")
        return residual(weight, factors)

    monkeypatch.setattr("corda_kernels.adapter.attaching.residual", failing)
    adapter = dataclasses.replace(adapter, layers=dict(reversed(adapter.layers.items())))
    with pytest.raises(torch.OutOfMemoryError):
        attach(base, adapter)
    assert list(map(type, base.modules())) == kinds
    assert same(dict(base.state_dict()), dict(before))
    assert not hasattr(base.config, "corda_residual")


def test_initial_factors_beside_another_adapters_record_are_refused(
    calibrated: Calibrated, folder: Path, published: Path
) -> None:
    shutil.copy(folder / "corda.json", published)
    with pytest.raises(AdapterError, match=r"corda\.json belongs to another adapter: copy it"):
        load_for_training(calibrated()[0], published)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("trained cut", f"{WEIGHTS} is truncated or not a safetensors file"),
        ("no trained", f"has no {WEIGHTS}: copy it from where"),
        ("config of another rank", "PEFT cannot load .*: "),
        ("no config", f"has no {CONFIG}: it is no adapter, or was copied in part"),
    ],
)
def test_a_damaged_checkpoint_without_record_is_refused(
    calibrated: Calibrated, folder: Path, damage: str, message: str
) -> None:
    (folder / "corda.json").unlink()
    DAMAGE[damage][0](folder)
    with pytest.raises(AdapterError, match=message):
        load_for_training(calibrated()[0], folder)
