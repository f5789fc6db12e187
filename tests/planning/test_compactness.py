from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairs import pairs
from torch import Tensor, nn

from corda_kernels.calibration import CovarianceSet
from corda_kernels.errors import ConfigError, DecompositionError
from corda_kernels.linears import linear_weight
from corda_kernels.planning import compactness, layer_spectra
from corda_kernels.planning.scores import CONDITIONS, log_condition

SHAPES = {"wide": (12, 30), "square": (20, 20), "tall": (30, 12)}


def literal(weight: Tensor, covariance: Tensor, damping: float, condition: str) -> float:
    """The definition in float64 by two full SVDs."""
    C = covariance.double()
    C = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    conditions = torch.linalg.svd(C / C.diagonal().mean())[1]
    largest, smallest = float(conditions[0]), float(conditions[-1])
    pi = (
        math.sqrt(weight.shape[0])
        * {
            "ratio": largest / smallest,
            "bound": math.sqrt(largest) / smallest,
            "tight": 1 / math.sqrt(smallest),
        }[condition]
    )
    sigma = torch.linalg.svd(weight.double() @ C)[1]
    return math.log(pi) * float((sigma / sigma[0]).sum())


def layer(shape: tuple[int, int], *, tokens: int = 100) -> tuple[Tensor, Tensor]:
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(tokens, shape[1], dtype=torch.float64) * torch.logspace(1, -2, shape[1])
    return weight, x.T @ x / tokens


@pytest.mark.parametrize(
    ("shape", "damping", "condition"), pairs(list(SHAPES.values()), [0.0, 0.01, 0.5], CONDITIONS)
)
def test_the_score_is_its_definition(
    shape: tuple[int, int], damping: float, condition: Any
) -> None:
    weight, C = layer(shape)
    found = compactness(weight, C, damping=damping, condition=condition)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(literal(weight, C, damping, condition), rel=1e-4)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("factor", [1e-12, 7.0, 1e9])
def test_the_scale_of_the_inputs_does_not_matter(factor: float, condition: Any) -> None:
    weight, C = layer((12, 30))
    expected = compactness(weight, C, condition=condition)
    found = compactness(weight, factor * C, condition=condition)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


SCALES = (1e-300, 1e-200, 1e-150, 1.0, 1e150, 1e200, 1e300)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_score_does_not_go_by_the_units_of_weight_and_inputs(condition: Any) -> None:
    weight, C = layer((6, 5))
    expected = compactness(weight, C, condition=condition)
    for w, c in itertools.product(SCALES, SCALES):
        found = compactness(w * weight, c * C, condition=condition)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0, msg=f"{w} {c}")


def test_a_batch_is_scored_item_by_item() -> None:
    layers = [layer((12, 30)) for _ in range(6)]
    weights, covariances = (torch.stack(part) for part in zip(*layers, strict=True))
    found = compactness(weights.view(2, 3, 12, 30).float(), covariances.view(2, 3, 30, 30))
    assert found.shape == (2, 3)
    expected = [compactness(weight.float(), C) for weight, C in layers]
    torch.testing.assert_close(found.flatten(), torch.stack(expected), rtol=1e-4, atol=0)


def test_a_low_rank_is_compact_and_none_at_all_is_zero() -> None:
    weight, C = layer((20, 20))
    one = torch.outer(weight[0], weight[1])
    assert float(compactness(one, C)) == pytest.approx(float(log_condition(C, 20)), rel=1e-6)
    assert float(compactness(0 * weight, C)) == 0


def test_one_token_can_be_scored() -> None:
    # λ/mean = 10 + 0.01 once and 0.01 else; of WC ∝ xxᵀ + 0.01·mean·1 likewise.
    x = torch.zeros(10, dtype=torch.float64)
    x[3] = 5.0
    found = compactness(torch.eye(10, dtype=torch.float64), torch.outer(x, x))
    ratio = 10.01 / 0.01
    expected = math.log(math.sqrt(10) * ratio) * (1 + 9 / ratio)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_log_condition_is_never_negative(condition: Any) -> None:
    C = torch.eye(4, dtype=torch.float64)
    assert float(log_condition(C, 1, condition=condition)) == pytest.approx(0, abs=1e-12)
    assert float(log_condition(C, 9, condition=condition)) == pytest.approx(math.log(3))


@pytest.mark.parametrize("damping", [-0.1, math.nan, math.inf])
def test_impossible_options_are_refused(damping: float) -> None:
    weight, C = layer((4, 4))
    with pytest.raises(ConfigError, match="damping"):
        compactness(weight, C, damping=damping)
    with pytest.raises(ConfigError, match='"ratio", "bound" or "tight"'):
        compactness(weight, C, condition="other")  # type: ignore[arg-type]
    with pytest.raises(DecompositionError, match="all its inputs are zero"):
        compactness(weight, 0 * C)


def test_the_layers_of_a_model(calibrated: Callable[..., tuple[nn.Module, CovarianceSet]]) -> None:
    model, covariances = calibrated()
    modules = {name: model.get_submodule(name) for name in covariances}
    found = layer_spectra(modules, covariances, condition="bound")
    assert list(found) == list(modules)
    for name, spectrum in found.items():
        weight, C = linear_weight(modules[name]).detach(), covariances[name].matrix
        assert spectrum.singular_values.shape == (min(weight.shape),)
        assert spectrum.compactness == pytest.approx(literal(weight, C, 0.01, "bound"), rel=1e-4)
        expected = float(log_condition(C, weight.shape[0], condition="bound"))
        assert spectrum.log_condition == pytest.approx(expected)
    some = dict(list(modules.items())[1:3])
    assert list(layer_spectra(some, covariances)) == list(some)


def test_a_layer_that_cannot_be_scored_is_named(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
) -> None:
    model, covariances = calibrated()
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).weight.data[0, 0] = math.nan
    modules = {name: model.get_submodule(name) for name in covariances}
    with pytest.raises(DecompositionError, match=rf"layer {name}: .*NaN"):
        layer_spectra(modules, covariances)


def test_a_layer_whose_inputs_are_all_zero_says_so(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
) -> None:
    model, covariances = calibrated()
    name = "model.layers.1.mlp.down_proj"
    zero = replace(covariances[name], matrix=torch.zeros_like(covariances[name].matrix))
    with pytest.raises(DecompositionError, match=rf"layer {name}: all its inputs are zero"):
        layer_spectra({name: model.get_submodule(name)}, CovarianceSet({name: zero}))
