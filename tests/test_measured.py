"""What an adapter's record keeps of its run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from kinds import Calibrated

from corda_kernels import CordaConfig
from corda_kernels.adapter import read_adapter, write_adapter
from corda_kernels.calibration import Covariance
from corda_kernels.init import corda_adapter
from corda_kernels.init.measured import measured_input, sampled_spectrum
from corda_kernels.linalg import singular_values
from corda_kernels.targets import target_linears


@pytest.mark.parametrize("total", [1, 2, 3, 40, 576, 11008])
def test_a_whole_spectrum_is_sampled_closely_at_both_ends(total: int) -> None:
    values = torch.logspace(0, -9, total, dtype=torch.float64)
    found = sampled_spectrum(values, 0, total)
    assert json.loads(json.dumps(found)) == found
    index = found["index"]
    assert found["total"] == total
    assert index[0] == 0
    assert index[-1] == total - 1
    assert index == sorted(set(index))
    assert len(index) <= 40
    # The ends mirror each other, but for one place by rounding.
    mirrored = [total - 1 - place for place in reversed(index)]
    assert all(abs(a - b) <= 1 + total // 500 for a, b in zip(index, mirrored, strict=True))
    if total > 100:
        assert index[:3] == [0, 1, 2]
    for place, value in zip(index, found["value"], strict=True):
        assert value == pytest.approx(float(values[place]), rel=1e-3)


@pytest.mark.parametrize(("first", "count"), [(0, 32), (544, 32), (0, 1), (575, 1), (200, 7)])
def test_a_part_of_a_spectrum_keeps_its_place(first: int, count: int) -> None:
    values = torch.linspace(9, 1, 576, dtype=torch.float64)
    found = sampled_spectrum(values[first : first + count], first, 576)
    assert found["index"][0] == first
    assert found["index"][-1] == first + count - 1
    for place, value in zip(found["index"], found["value"], strict=True):
        assert value == pytest.approx(float(values[place]), rel=1e-3)


@pytest.mark.parametrize("channels", [3, 64, 576])
def test_channels_are_summed_up_by_their_maxima(channels: int) -> None:
    absmax = torch.ones(channels)
    absmax[channels // 2] = 50
    counts = torch.zeros(channels, dtype=torch.int64)
    counts[channels // 2] = 4
    covariance = Covariance(torch.eye(channels), 10, 1, absmax, counts, 6.0)
    note = measured_input(covariance, ["a", "b"])
    assert json.loads(json.dumps(note)) == note
    assert len(note["absmax"]) == min(64, channels)
    assert sorted(note["absmax"])[-2:] == [1, 50]
    assert (note["median"], note["channel"], note["outliers"]) == (1, channels // 2, 1)
    assert (note["layers"], note["tokens"], note["channels"]) == (["a", "b"], 10, channels)


@pytest.mark.parametrize(
    ("mode", "options", "stages"),
    [
        ("ipm", {"rank": 4, "stability": True}, ["calibration", "stability", "decomposition"]),
        ("kpm", {"rank": 4, "memory_limit": 30_000}, None),
        (
            "kpm",
            {"budget": "r=3", "candidates": 2},
            ["selection", "calibration", "allocation", "decomposition"],
        ),
    ],
)
def test_a_run_is_measured(
    calibrated: Calibrated, tmp_path: Any, mode: Any, options: dict[str, Any], stages: Any
) -> None:
    model, _ = calibrated()
    batches = list(torch.randint(3, 64, (4, 3, 40)))
    config = CordaConfig(mode, progress=False, **options)
    adapter = corda_adapter(model, batches, config)
    measured = adapter.record.measured
    if stages is None:  # block by block
        assert {"calibration", "decomposition"} <= measured["seconds"].keys()
    else:
        assert list(measured["seconds"]) == stages
    assert measured["peak_bytes"]["process"] > 0
    modules = target_linears(model)
    assert measured["layers"].keys() == modules.keys()
    read = [name for note in measured["inputs"] for name in note["layers"]]
    assert sorted(read) == sorted(modules)
    for name, module in modules.items():
        note, entry = measured["layers"][name], adapter.record.layers.get(name)
        assert note["shape"] == list(module.weight.shape)
        whole, index = min(module.weight.shape), note["spectrum"]["index"]
        assert note["spectrum"]["total"] == whole
        if "budget" in options:
            assert (index[0], index[-1]) == (0, whole - 1)
            assert note["condition"] > 1
        elif mode == "ipm":
            assert (index[0], index[-1]) == (0, 3)
        else:
            assert (index[0], index[-1]) == (whole - 4, whole - 1)
        if entry is not None and "budget" not in options:
            ends = [entry.sigma_max, entry.sigma_min]
            values = note["spectrum"]["value"]
            assert [values[0], values[-1]] == pytest.approx(ends, rel=1e-3)
    write_adapter(adapter, tmp_path)
    assert read_adapter(tmp_path).record.measured == measured


def test_whole_spectra_are_those_of_the_damped_product(calibrated: Calibrated) -> None:
    model, covariances = calibrated()
    config = CordaConfig("kpm", budget="r=3", progress=False)
    measured = corda_adapter(model, covariances, config).record.measured
    assert list(measured["seconds"]) == ["allocation", "decomposition"]
    for name, note in measured["layers"].items():
        weight, matrix = model.get_submodule(name).weight.detach(), covariances[name].matrix
        values = singular_values(weight, matrix, damping=0.01)
        expected = values[torch.tensor(note["spectrum"]["index"])].tolist()
        assert note["spectrum"]["value"] == pytest.approx(expected, rel=1e-3)
        eigenvalues = torch.linalg.eigvalsh(matrix.double())
        shift = 0.01 * eigenvalues.mean()
        condition = float((eigenvalues[-1] + shift) / (eigenvalues[0] + shift))
        assert note["condition"] == pytest.approx(condition, rel=0.01)


def test_how_long_a_run_took_is_no_part_of_what_it_made(calibrated: Calibrated) -> None:
    model, covariances = calibrated()
    first, second = (
        corda_adapter(model, covariances, CordaConfig("ipm", rank=4, progress=False)).record
        for _ in range(2)
    )
    second.measured["seconds"]["decomposition"] += 1
    assert first == second
