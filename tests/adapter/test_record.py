from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from kinds import Calibrated
from torch import nn

from corda_kernels.adapter import AdapterRecord
from corda_kernels.adapter.base import base_difference, describe_base
from corda_kernels.adapter.record import FORMAT, LayerNote, check_base
from corda_kernels.errors import AdapterError
from corda_kernels.targets import target_linears

KEPT = {"mode": "kpm", "rank": 2, "hold": 1.0, "residual": None}


def record(model: nn.Module, **changes: Any) -> AdapterRecord:
    note = LayerNote(rank=2, tokens=9, sigma_max=2.0, sigma_min=1.0, residual=0.0)
    values = {"damping": 0.01, "calibration": {"tokens": 9}, "layers": {"a": note}}
    base = describe_base(model, target_linears(model)) | {"target_modules": ["a"]}
    return AdapterRecord(**(KEPT | values | {"base": base} | changes))


ALLOCATION = {"budget": 9, "spent": 8, "condition": "ratio", "ranks": {"a": 2, "b": 0}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hold": 8, "damping": None},
        {"hold": None, "residual": "weight", "mode": "ipm"},
        {"allocation": ALLOCATION},
        {"lora": {"lora_dropout": 0.1, "modules_to_save": ["lm_head"]}},
        {"versions": {"torch": "2"}, "stability": {"a": [1.0]}},
    ],
)
def test_a_record_survives_json(calibrated: Calibrated, changes: dict[str, Any]) -> None:
    written = record(calibrated()[0], **changes)
    assert AdapterRecord.from_json(json.loads(json.dumps(written.to_json()))) == written


def test_what_was_measured_does_not_count_when_records_are_compared(calibrated: Calibrated) -> None:
    model, _ = calibrated()
    assert record(model, measured={"seconds": {"all": 1.0}}) == record(model)
    assert record(model, calibration={}) != record(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "corda_kernels.adapter/5"}, f"format .*/5', this version reads {FORMAT!r}: up"),
        ({"format": "corda_kernels.adapter/3"}, r"format 'corda_kernels.adapter/3'.*make the adap"),
        ({"format": None}, "has format None"),
        ({"extra": 1}, "altered: field 'extra' is missing or unknown"),
        ({"step": "lora"}, "altered: field 'step' is missing or unknown"),
    ],
)
def test_a_record_of_another_form_is_refused(
    calibrated: Calibrated, change: dict[str, Any], message: str
) -> None:
    value = record(calibrated()[0]).to_json() | change
    with pytest.raises(AdapterError, match=message):
        AdapterRecord.from_json(value)


# Of each field, by its path: values that it cannot have.
WRONG: dict[str, list[Any]] = {
    "mode": [None, 1, "both"],
    "rank": [None, "2", 2.5],
    "hold": ["1", [1]],
    "residual": [0, "pair"],
    "damping": ["0.01", {}],
    "base": [None, []],
    "calibration": [None, "text"],
    "layers": [None, []],
    "allocation": [None, []],
    "stability": [None, 1.0],
    "measured": [None, []],
    "versions": [None, "2"],
    "lora": [None, []],
    "freeze_a": [None, 1, True],
    "base.source": [1, []],
    "base.sample": [None, [], [1.0] * 63, ["1"] * 64],
    "base.target_modules": [None, [1]],
    "base.fan_in_fan_out": [None, "no"],
    "base.task_type": [1],
    "layers.a": [None, []],
    "layers.a.rank": [None, "2"],
    "layers.a.tokens": [None, 1.5],
    "layers.a.sigma_max": [None, "1"],
    "layers.a.sigma_min": [None, "1"],
    "layers.a.residual": [None, "0"],
    "allocation.budget": [None, 1.5],
    "allocation.spent": [None, "8"],
    "allocation.condition": [None, 1],
    "allocation.ranks": [None, [2], {"a": 3}, {"b": 2}, {"a": 2, "b": 1}],
}
MAY_LACK = {"base.quantised", "sides"}


def fields(value: dict[str, Any], path: str = "") -> list[str]:
    """Paths of all fields that a record must have."""
    found = []
    for name, entry in value.items():
        found.append(path + name)
        if path + name in ("base", "layers", "layers.a", "allocation"):
            found += fields(entry, f"{path}{name}.")
    return found


def test_every_field_has_its_wrong_values(calibrated: Calibrated) -> None:
    there = fields(record(calibrated()[0], allocation=ALLOCATION).to_json())
    assert set(there) - {"format"} - MAY_LACK == WRONG.keys()


def is_refused(record: dict[str, Any], path: str, *value: Any) -> bool:
    """Whether a record is refused with another value of a field, or without the field."""
    altered = copy.deepcopy(record)
    *above, last = path.split(".")
    entry = altered
    for name in above:
        entry = entry[name]
    del entry[last]
    if value:
        entry[last] = value[0]
    try:
        AdapterRecord.from_json(altered)
    except AdapterError as error:
        return "corda.json was altered" in str(error)
    return False


def test_a_field_of_another_kind_is_refused(calibrated: Calibrated) -> None:
    sound = record(calibrated()[0], allocation=ALLOCATION).to_json()
    values = [(path, value) for path, wrong in WRONG.items() for value in wrong]
    assert [case for case in values if not is_refused(sound, *case)] == []


def test_an_earlier_record_is_of_one_side(calibrated: Calibrated) -> None:
    sound = record(calibrated()[0], sides="both").to_json()
    assert AdapterRecord.from_json(sound).product == "D^½·W·C^½"
    assert is_refused(sound, "sides", "outputs")
    del sound["sides"]
    assert AdapterRecord.from_json(sound).product == "W·C"


def test_a_field_that_is_gone_is_refused(calibrated: Calibrated) -> None:
    sound = record(calibrated()[0], allocation=ALLOCATION).to_json()
    assert [path for path in WRONG if not is_refused(sound, path)] == []


@pytest.mark.parametrize(
    ("architecture", "targets", "expected"),
    [
        ("llama", ["q_proj", "mlp.up_proj"], ["q_proj", "up_proj"]),
        ("llama", r".*\.0\..*k_proj", ["model.layers.0.self_attn.k_proj"]),
        ("gpt2", "all-linear", ["c_attn", "c_fc", "c_proj"]),
        ("gpt2", ["attn.c_proj"], [f"transformer.h.{i}.attn.c_proj" for i in range(2)]),
        ("llama", ["lm_head"], ["lm_head"]),
    ],
)
def test_target_modules_are_short_where_that_selects_the_same(
    calibrated: Calibrated, architecture: str, targets: Any, expected: list[str]
) -> None:
    model, _ = calibrated(architecture)
    described = describe_base(model, target_linears(model, targets))
    assert described["target_modules"] == expected
    assert described["fan_in_fan_out"] == (architecture == "gpt2")
    assert described["task_type"] == "CAUSAL_LM"
    assert described["source"] == model.name_or_path


def test_a_bare_decoder_extracts_features(calibrated: Calibrated) -> None:
    model = calibrated()[0].model
    assert describe_base(model, target_linears(model))["task_type"] == "FEATURE_EXTRACTION"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_is_recognised_in_any_dtype(
    calibrated: Calibrated, architecture: str, dtype: torch.dtype
) -> None:
    model, _ = calibrated(architecture)
    noted = record(model)
    check_base(noted, target_linears(model.to(dtype)))


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_a_fine_tuned_base_is_not_recognised(calibrated: Calibrated, share: float) -> None:
    model, _ = calibrated()
    noted = record(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += share * parameter.std(correction=0) * torch.randn_like(parameter)
    with pytest.raises(AdapterError, match=r"weights differ from that one's by \d+\.\d%: load the"):
        check_base(noted, target_linears(other))
    assert base_difference(noted.base, target_linears(other)) > 0.5 * share


def test_a_base_of_nan_is_not_recognised(calibrated: Calibrated) -> None:
    model, _ = calibrated()
    noted = record(model)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(AdapterError, match="weights differ from that one's"):
        check_base(noted, target_linears(model))


@pytest.mark.parametrize("quantised", [True, False])
def test_a_quantised_base_may_differ_by_the_error_of_quantisation(
    calibrated: Calibrated, quantised: bool
) -> None:
    model, _ = calibrated()
    described = describe_base(model, target_linears(model)) | {"quantised": quantised}
    for parameter in model.parameters():
        parameter.data *= 1.1
    found = base_difference(described, target_linears(model))
    assert found == (0.0 if quantised else pytest.approx(0.1, rel=1e-3))
