from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from corda_kernels.errors import AdapterError
from corda_kernels.initialization import (
    Adapter,
    AdapterFactors,
    AdapterRecord,
    LayerAdapter,
    describe_base,
)
from corda_kernels.initialization.adapter import check_base
from corda_kernels.models import target_linears

Calibrated = Callable[..., tuple[nn.Module, Any]]
KEPT = {"mode": "kpm", "rank": 2, "balance": "even", "step": None, "residual": "pair"}


def layer(scaling: float = 0.5) -> LayerAdapter:
    """A trained one, of rank 2 for a weight 5 × 3."""
    A, B, A0, B0 = torch.randn(2, 3), torch.randn(5, 2), torch.randn(2, 3), torch.randn(5, 2)
    return LayerAdapter(A, B, A0, B0, scaling)


def record(model: nn.Module, **changes: Any) -> AdapterRecord:
    entry = {"rank": 2, "scaling": 1.0, "tokens": 9}
    entry |= {"sigma_max": 2.0, "sigma_min": 1.0, "residual": 0.0}
    values = {"damping": 0.01, "calibration": {"tokens": 9}, "layers": {"a": entry}}
    base = describe_base(model, target_linears(model))
    return AdapterRecord(**(KEPT | values | {"base": base} | changes))


def test_a_fresh_layer_has_learnt_nothing() -> None:
    A, B = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    fresh = LayerAdapter.fresh(AdapterFactors(A, B, 0.5))
    assert fresh.rank == 2
    for trained, initial, source in ((fresh.A, fresh.A0, A), (fresh.B, fresh.B0, B)):
        assert trained.dtype == torch.float32
        assert torch.equal(trained, source.float())
        assert torch.equal(trained, initial)
        assert trained.data_ptr() != initial.data_ptr()
    # B A − B0 A0, summed over 2r products of float32: all that is left is their rounding.
    assert fresh.delta().abs().max() < 4 * torch.finfo(torch.float32).eps * (B.norm() * A.norm())


def test_delta_is_what_training_added() -> None:
    found = layer(scaling=0.5)
    A, B, A0, B0 = (getattr(found, name).double() for name in ("A", "B", "A0", "B0"))
    torch.testing.assert_close(found.delta(), (0.5 * (B @ A - B0 @ A0)).float())
    torch.testing.assert_close(found.initial_product(), (0.5 * B0 @ A0).float())


def test_the_checksum_is_of_the_initial_factors_only(calibrated: Calibrated) -> None:
    first = Adapter({"a": layer()}, record(calibrated()[0]))
    checksum = first.initial_checksum()
    first.layers["a"].A.add_(1)
    first.layers["a"].B.add_(1)
    assert first.initial_checksum() == checksum
    first.layers["a"].B0[0, 0].neg_()
    assert first.initial_checksum() != checksum


def test_a_record_survives_json(calibrated: Calibrated) -> None:
    written = record(calibrated()[0], versions={"torch": "2"}, initial_sha256="ab")
    assert AdapterRecord.from_json(json.loads(json.dumps(written.to_json()))) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "corda_kernels.adapter/4"}, "format 'corda_kernels.adapter/4'.*update"),
        ({"format": None}, "has format None"),
        ({"extra": 1}, "altered: field 'extra' is missing or unknown"),
        ({"base": ...}, "altered: field 'base' is missing or unknown"),
    ],
)
def test_a_record_of_another_form_is_refused(
    calibrated: Calibrated, change: dict[str, Any], message: str
) -> None:
    value = record(calibrated()[0]).to_json() | change
    value = {name: entry for name, entry in value.items() if entry is not ...}
    with pytest.raises(AdapterError, match=message):
        AdapterRecord.from_json(value)


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


def test_a_bare_decoder_has_no_task(calibrated: Calibrated) -> None:
    model = calibrated()[0].model
    assert describe_base(model, target_linears(model))["task_type"] is None


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
