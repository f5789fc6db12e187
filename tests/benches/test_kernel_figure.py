from __future__ import annotations

import copy
import json
import re

import kernel_figure
import pytest
from render import RESULTS

MEASURED = json.loads((RESULTS / "gpu-covariance.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("channels", "milliseconds"),  # 1.0705e15 operations and 3.35e12 bytes a second
    [(576, (0.0056, 0.0051, 0.0120)), (8192, (0.0801, 1.0272, 1.0592))],
)
def test_the_floors_are_those_of_the_device(
    channels: int, milliseconds: tuple[float, float, float]
) -> None:
    found = kernel_figure.floors(16384, channels, 1980)
    assert [1e3 * value for value in found.values()] == pytest.approx(milliseconds, abs=1e-4)


def test_no_measured_speed_is_above_what_the_device_allows() -> None:
    for row in MEASURED["syrk"]:
        if row["dtype"] == "bfloat16" and row["timing"]:
            clock = MEASURED["environment"]["clock_mhz"]
            least = kernel_figure.floors(row["tokens"], row["channels"], clock)
            assert row["timing"]["p50"] > max(least.values())


def test_equal_results_make_an_equal_figure_and_wrong_ones_have_no_speed() -> None:
    drawn = kernel_figure.draw(MEASURED)
    assert kernel_figure.draw(copy.deepcopy(MEASURED)) == drawn
    assert b"NVIDIA H100 80GB HBM3, torch 2.11.0" in drawn
    worse = copy.deepcopy(MEASURED)
    right = [row for row in worse["syrk"] if row["passed"] and row["backend"] == "triton"]
    right[0] |= {"passed": False, "timing": None}

    def markers(svg: bytes) -> int:
        return len(re.findall(rb"<use ", svg))

    assert markers(kernel_figure.draw(worse)) == markers(drawn) - 1


def test_a_device_without_known_peaks_has_no_figure() -> None:
    other = MEASURED | {"environment": MEASURED["environment"] | {"device": "A card"}}
    with pytest.raises(ValueError, match="A card"):
        kernel_figure.draw(other)
