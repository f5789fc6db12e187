"""Spectra of covariances, against those of float64 matrices that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import Calibrated
from torch import Tensor

from corda_kernels import CovarianceSet
from corda_kernels.calibration import Covariance
from corda_kernels.errors import CovarianceError, DecompositionError
from corda_kernels.linalg import singular_values
from corda_kernels.report import measure
from corda_kernels.report.measure import measure_inputs, measure_spectra
from corda_kernels.targets import target_linears


def covariance(eigenvalues: Tensor) -> Covariance:
    """With these eigenvalues, in a random basis."""
    channels = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
    matrix = Q * eigenvalues @ Q.mT
    counts = torch.zeros(channels, dtype=torch.int64)
    return Covariance((matrix + matrix.mT) / 2, 99, 1, torch.ones(channels), counts, 6.0)


@pytest.mark.parametrize("dense", [True, False])
def test_spectra_are_relative_to_their_mean_and_in_the_sets_order(
    monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    if not dense:
        monkeypatch.setattr(measure, "_DENSE_SIZE", 4)
    spectra = {
        "b": torch.logspace(2, -4, 24, dtype=torch.float64),
        "a": torch.linspace(5, 1, 12, dtype=torch.float64),
    }
    spectra["singular"] = torch.cat([spectra["a"], torch.zeros(4, dtype=torch.float64)])
    found = measure_inputs(
        CovarianceSet({name: covariance(values) for name, values in spectra.items()})
    )
    assert [note["layers"] for note in found] == [[name] for name in spectra]
    for note, values in zip(found, spectra.values(), strict=True):
        values = values / values.mean()
        assert note["largest"] == pytest.approx(float(values[0]), rel=0.01)
        assert note["smallest"] == pytest.approx(float(values[-1]), rel=0.01)
        effective = float(values.sum() ** 2 / values.square().sum())
        assert note["effective_rank"] == pytest.approx(effective)
        assert ("spectrum" in note) == dense
        if dense:
            expected = values[torch.tensor(note["spectrum"]["index"])]
            assert note["spectrum"]["value"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("least", [-1e-4, -0.5])
def test_a_wide_covariance_with_negative_eigenvalues_is_refused_by_its_layers_name(
    least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_DENSE_SIZE", 4)
    values = torch.ones(12, dtype=torch.float64)
    values[-1] = least  # rounding, or no covariance
    of_layer = CovarianceSet({"block.3.q_proj": covariance(values)})
    if least > -1e-2:
        (note,) = measure_inputs(of_layer)
        assert note["smallest"] == 0
        assert note["largest"] == pytest.approx(12 / float(values.sum()), rel=0.01)
    else:
        with pytest.raises(DecompositionError, match=r"layer block\.3\.q_proj: .* negative eigen"):
            measure_inputs(of_layer)


def test_a_covariance_of_zeros_has_no_spectrum() -> None:
    (note,) = measure_inputs(CovarianceSet({"a": covariance(torch.zeros(5))}))
    assert note["effective_rank"] == 0
    assert note.keys().isdisjoint({"largest", "smallest", "spectrum"})


def test_what_is_not_finite_is_named() -> None:
    broken = covariance(torch.ones(5))
    broken.matrix[0, 1] = float("nan")
    with pytest.raises(DecompositionError, match=r"layer a: .*NaN or Inf"):
        measure_inputs(CovarianceSet({"a": broken}))


def test_products_are_those_of_the_damped_covariance(calibrated: Calibrated) -> None:
    model, covariances = calibrated()
    modules: dict[str, Any] = target_linears(model, ["q_proj", "down_proj"])
    found = measure_spectra(modules, covariances, damping=0.01)
    assert found.keys() == modules.keys()
    for name, note in found.items():
        weight = modules[name].weight.detach()
        values = singular_values(weight, covariances[name].matrix, damping=0.01)
        expected = values[torch.tensor(note["spectrum"]["index"])].tolist()
        assert note["shape"] == list(weight.shape)
        assert note["spectrum"]["value"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(CovarianceError, match="cover none of the model's layers"):
        measure_spectra({"x": modules.popitem()[1]}, covariances, damping=0.01)
