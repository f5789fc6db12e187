"""Speed of C += XᵀX against the number of channels, with what the device allows at the most."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# An H100 SXM, as NVIDIA publishes it: 989.4 TFLOP/s in bfloat16 on 132 multiprocessors at 1830 MHz,
# which is 4096 operations a clock and multiprocessor; and the rate of its memory in bytes a second.
_PER_CLOCK = 132 * 4096
_MEMORY = 3.35e12
_TILE = 256
_DEVICE = "H100 80GB HBM3"
_DRAWN = {"addmm": ("torch.addmm, no statistics", "s"), "triton": ("here, with statistics", "o")}


def floors(tokens: int, channels: int, clock_mhz: float) -> dict[str, float]:
    """The least seconds that a call can take, by what it cannot do in less.

    X (tokens, channels) is read once, in 16 bits; the triangle is multiplied at the full rate of
    the tensor cores, once as it is and once in whole tiles of 256 × 256.
    """
    rate = _PER_CLOCK * clock_mhz * 1e6
    rows = -(-channels // _TILE)
    return {
        "reading X once": 2 * tokens * channels / _MEMORY,
        "the triangle's products": _operations(tokens, channels) / rate,
        f"products in tiles of {_TILE}": tokens * rows * (rows + 1) * _TILE**2 / rate,
    }


def _operations(tokens: int, channels: int) -> float:
    return tokens * channels * (channels + 1.0)


def draw(results: dict[str, Any]) -> bytes:
    """The figure as SVG, of the JSON of `bench covariance` on an H100. What is wrong has no speed.

    Raises:
        ValueError: the results are of another device, whose peaks are not known here.
    """
    about = results["environment"]
    if _DEVICE not in about["device"]:
        raise ValueError(f"the peaks of {about['device']} are not known, those of {_DEVICE} are")
    rows = [row for row in results["syrk"] if row["dtype"] == "bfloat16"]
    (tokens,) = {row["tokens"] for row in rows}
    channels = sorted({row["channels"] for row in rows})
    # Equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "kernel", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for backend, (label, marker) in _DRAWN.items():
            points = {
                row["channels"]: _operations(tokens, row["channels"]) / row["timing"]["p50"] / 1e12
                for row in rows
                if row["backend"] == backend and row["passed"]
            }
            speeds = [points.get(width, math.nan) for width in channels]
            axes.plot(channels, speeds, marker=marker, label=label)
        grid = range(channels[0], channels[-1] + 1, 32)
        of = [floors(tokens, width, about["clock_mhz"]) for width in grid]
        for name, style in zip(of[0], (":", "-", "--"), strict=True):
            speeds = [
                _operations(tokens, width) / floor[name] / 1e12
                for width, floor in zip(grid, of, strict=True)
            ]
            axes.plot(grid, speeds, style, color="gray", linewidth=1, label=f"at most: {name}")
        axes.set(xscale="log", xlabel="channels", ylabel="TFLOP/s of the triangle", ylim=(0, 1200))
        axes.set_xticks(channels, [str(width) for width in channels], minor=False)
        axes.minorticks_off()
        where = f"{about['device']}, torch {about['versions']['torch']}"
        axes.set_title(f"{tokens:,} tokens in bfloat16, {where}", fontsize=9)
        axes.legend(fontsize=7)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
