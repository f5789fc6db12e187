"""What an initialisation comes across anyway and a report shows: spectra, channels, time, memory.

All of it is small: a spectrum is some forty of its values, a map of channels sixty-four maxima.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corda_kernels.calibration import Covariance
from corda_kernels.memory import cuda_peak_bytes, peak_bytes
from corda_kernels.planning.scores import Condition, LayerSpectrum
from corda_kernels.usage import Stopwatch

# Values kept of a whole spectrum, and maxima of a layer's input.
_VALUES = 40
_BINS = 64


def sampled_spectrum(values: Tensor, first: int, total: int) -> dict[str, Any]:
    """Values of a spectrum at places that lie close at both ends, as JSON.

    Args:
        values: (k,), descending: all of it, or the part from number `first` on.
        first: number of the first value in the whole, from 0.
        total: length of the whole spectrum.

    Returns:
        `total`, and `index` (from 0, ascending, the first and the last of the part among them) and
        `value`, four digits each.
    """
    # Evenly spaced in log(share/(1 − share)), where either end is as wide as the middle.
    width = math.log(2 * total - 1)
    steps = torch.linspace(-width, width, _VALUES, dtype=torch.float64)
    places = (torch.sigmoid(steps) * total).floor().long().clamp(0, total - 1).tolist()
    last = first + values.numel() - 1
    kept = sorted({first, last} | {place for place in places if first <= place <= last})
    found = values[torch.tensor(kept) - first].tolist()
    return {"total": total, "index": kept, "value": [float(f"{value:.4g}") for value in found]}


def measured_input(covariance: Covariance, names: Sequence[str]) -> dict[str, Any]:
    """Statistics of the channels of one input, as JSON.

    Args:
        covariance: of the input.
        names: of the layers that read it.

    Returns:
        `layers`, `tokens`, `channels`; `absmax`, the largest |x| in each of up to 64 runs of
        neighbouring channels; `median`, the median over the channels of their largest |x|;
        `channel`, the one with the largest |x| of all; `outliers`, in how many channels any |x|
        exceeded `threshold`.
    """
    absmax = covariance.absmax.double().cpu()
    runs = torch.tensor_split(absmax, min(_BINS, absmax.numel()))
    return {
        "layers": list(names),
        "tokens": covariance.tokens,
        "channels": absmax.numel(),
        "absmax": [float(f"{float(run.max()):.3g}") for run in runs],
        "median": float(f"{float(absmax.median()):.3g}"),
        "channel": int(absmax.argmax()),
        "outliers": int((covariance.outlier_count > 0).sum()),
        "threshold": covariance.outlier_threshold,
    }


def measured_layers(
    shapes: Mapping[str, tuple[int, int]],
    parts: Mapping[str, dict[str, Any]],
    spectra: Mapping[str, LayerSpectrum],
    condition: Condition,
) -> dict[str, dict[str, Any]]:
    """Of every layer `shape` and `spectrum`, as JSON, and `condition`, λmax/λmin of C damped.

    Args:
        shapes: (out, in) of each.
        parts: spectra of what was decomposed, from `sampled_spectrum`.
        spectra: whole ones, where a budget asked for them; they are taken instead.
        condition: what their log condition is of; only "ratio" tells λmax/λmin.
    """
    found: dict[str, dict[str, Any]] = {name: {"shape": list(shapes[name])} for name in shapes}
    for name, part in parts.items():
        found[name]["spectrum"] = part
    for name, spectrum in spectra.items():
        values = spectrum.singular_values
        found[name]["spectrum"] = sampled_spectrum(values, 0, values.numel())
        if condition == "ratio":
            ratio = math.exp(spectrum.log_condition) / math.sqrt(shapes[name][0])
            found[name]["condition"] = float(f"{ratio:.4g}")
    return found


def measured_run(
    layers: Mapping[str, dict[str, Any]], inputs: Iterable[dict[str, Any]], clock: Stopwatch
) -> dict[str, Any]:
    """What an adapter's record keeps of the run that made it; see `AdapterRecord.measured`."""
    peaks = {"process": peak_bytes()} | cuda_peak_bytes()
    return {
        "layers": dict(layers),
        "inputs": list(inputs),
        "seconds": {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()},
        "peak_bytes": {place: peak for place, peak in peaks.items() if peak},
    }
