"""The base that an adapter is loaded on: the right one, another one, or its residual."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import NO_BASE, WEIGHTS, factors, same
from kinds import Calibrated, Logits, Make
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from corda_kernels import CordaConfig, load_for_training, merge, save_adapter
from corda_kernels.adapter import read_adapter, write_adapter
from corda_kernels.adapter.attaching import subtract_initial
from corda_kernels.adapter.model import residual_marker
from corda_kernels.adapter.record import initial_checksum
from corda_kernels.errors import AdapterError, ModelError
from corda_kernels.init import corda_adapter, init_corda
from corda_kernels.linears import linear_weight

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(NO_BASE)]


def perturbed(calibrated: Calibrated) -> nn.Module:
    model, _ = calibrated()
    for parameter in model.parameters():
        parameter.data *= 1.02
    return model


@pytest.mark.parametrize(
    ("base", "message", "residual", "use_peft"),
    [
        (perturbed, r"weights differ from that one's by 2\.0%: load the base that", None, True),
        (perturbed, "weights differ from that one's by", "weight", False),
        (lambda c: c(initializer_range=0.11)[0], "weights differ from that", "weight", True),
        (
            lambda c: c(intermediate_size=40)[0],
            r"is \(32, 40\), but the adapter is for \(32, 48\): load",
            None,
            False,
        ),
        (
            lambda c: c(num_hidden_layers=1)[0],
            r"model\.layers\.1\..* of this model is no linear layer",
            "weight",
            False,
        ),
        (
            lambda c: c("gpt2")[0],
            r"model\.layers\.0\..* is no linear layer, .*without another adapt",
            None,
            True,
        ),
    ],
    ids=["tuned", "tuned residual", "other weights", "other widths", "fewer layers", "gpt2"],
)
def test_another_base_is_refused_and_left_alone(
    calibrated: Calibrated,
    folder: Path,
    published: Path,
    base: Callable[[Calibrated], nn.Module],
    message: str,
    use_peft: bool,
    residual: str | None,
) -> None:
    other = base(calibrated)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_for_training(other, folder if residual is None else published, use_peft=use_peft)
    assert same(dict(other.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("dtype", "residual", "use_peft"),
    [
        (torch.bfloat16, None, True),
        (torch.bfloat16, "weight", False),
        (torch.float16, "weight", True),
        (torch.float16, None, False),
    ],
)
def test_a_base_in_a_narrow_dtype_is_accepted(
    calibrated: Calibrated,
    adapt: Make,
    logits: Logits,
    tmp_path: Path,
    dtype: torch.dtype,
    use_peft: bool,
    residual: str | None,
) -> None:
    save_adapter(adapt(calibrated(), residual=residual), tmp_path)
    base, _ = calibrated()
    model = load_for_training(base.to(dtype), tmp_path, use_peft=use_peft)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found, expected = logits(model), logits(calibrated()[0])
    assert found.dtype == dtype
    if residual is None:
        assert torch.equal(found, logits(calibrated()[0].to(dtype)))
    # Three times the 1.4 epsilons measured.
    assert (found - expected).norm() < 4.2 * torch.finfo(dtype).eps * expected.norm()
    save_adapter(model, tmp_path / "again")


@pytest.mark.parametrize(("residual", "use_peft"), [(None, True), ("weight", False)])
def test_a_base_in_float64_is_accepted(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, use_peft: bool, residual: str | None
) -> None:
    model, covariances = calibrated()
    model = adapt((model.double(), covariances), residual=residual, use_peft=use_peft)
    save_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    loaded = load_for_training(calibrated()[0].double(), tmp_path, use_peft=use_peft)
    expected = factors(model)
    assert same({n: f.float() for n, f in factors(loaded).items()}, expected)


def test_a_second_adapter_on_top_is_refused(
    calibrated: Calibrated, adapt: Make, folder: Path
) -> None:
    with pytest.raises(AdapterError, match=r"is no linear layer, .*: load .* without another"):
        load_for_training(adapt(calibrated()), folder)


def stored_residual(
    calibrated: Calibrated, folder: Path, architecture: str = "llama", **options: Any
) -> nn.Module:
    """Does what `init --residual weight --save-base` does; returns the stored base, reloaded."""
    model, covariances = calibrated(architecture)
    options = {"mode": "ipm", "rank": 4} | options
    config = CordaConfig(residual="weight", progress=False, **options)
    adapter = corda_adapter(model, covariances, config)
    write_adapter(adapter, folder)
    assert adapter.initial is not None
    subtract_initial(model, adapter.initial)
    model.save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.mark.parametrize(("architecture", "use_peft"), [("llama", True), ("gpt2", False)])
def test_a_stored_residual_base_is_not_subtracted_from_twice(
    calibrated: Calibrated,
    logits: Logits,
    same_logits: Callable[..., bool],
    tmp_path: Path,
    architecture: str,
    use_peft: bool,
) -> None:
    base = stored_residual(calibrated, tmp_path, architecture)
    untouched, _ = calibrated(architecture)
    initial = read_adapter(tmp_path).initial
    assert initial is not None
    assert residual_marker(base) == initial_checksum(initial)
    assert residual_marker(untouched) is None
    before = {name: value.clone() for name, value in base.state_dict().items()}
    parameters = dict(base.named_parameters())

    model = load_for_training(base, tmp_path, use_peft=use_peft)
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())
    assert same_logits(logits(model), untouched)
    from_untouched = load_for_training(calibrated(architecture)[0], tmp_path, use_peft=use_peft)
    assert torch.equal(logits(from_untouched), logits(model))


def test_weights_of_the_residual_are_those_without_the_initial_product(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    base = stored_residual(calibrated, tmp_path)
    untouched, _ = calibrated()
    initial = read_adapter(tmp_path).initial
    assert initial is not None
    for name, part in initial.items():
        weight = linear_weight(untouched.get_submodule(name))
        expected = weight.double() - part.scaling * part.B.double() @ part.A.double()
        found = linear_weight(base.get_submodule(name))
        # One rounding of W', and those of a product of rank 4 in float32.
        assert (found - expected).norm() < torch.finfo(torch.float32).eps * weight.norm()
        assert (found - weight).norm() > 0.1 * weight.norm()


def test_the_residual_of_another_adapter_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    base = stored_residual(calibrated, tmp_path / "first")
    stored_residual(calibrated, tmp_path / "second", mode="kpm")
    with pytest.raises(AdapterError, match="is the residual of another adapter: load the untouch"):
        load_for_training(base, tmp_path / "second")


def test_a_residual_gets_no_new_adapter(
    calibrated: Calibrated, folder: Path, tmp_path: Path
) -> None:
    base = stored_residual(calibrated, tmp_path / "residual")
    for residual in (None, "weight"):
        config = CordaConfig("ipm", rank=4, residual=residual, progress=False)
        with pytest.raises(ModelError, match=r"is the residual of an adapter.*untouched"):
            init_corda(base, calibrated()[1], config)
    # Nor one that was made for the untouched base.
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match="is the residual of another adapter: load the unt"):
            load_for_training(base, folder, use_peft=use_peft)


def test_a_merged_published_adapter_is_no_residual_any_more(
    calibrated: Calibrated, published: Path
) -> None:
    merged = merge(load_for_training(calibrated()[0], published))
    assert residual_marker(merged) is None
    for note in ("corda_record", "corda_initial"):
        assert not hasattr(merged, note)
