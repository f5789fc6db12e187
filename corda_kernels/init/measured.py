"""What an initialisation comes across anyway and a report shows: spectra, channels.

All of it is small: a spectrum is some forty of its values, a map of channels sixty-four maxima.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration import Covariance
from corda_kernels.linears import linear_shape
from corda_kernels.planning.scores import Condition, LayerSpectrum

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


def measured_layer(
    module: nn.Module, part: dict[str, Any], whole: LayerSpectrum | None, condition: Condition
) -> dict[str, Any]:
    """Of one layer `shape` and `spectrum`, as JSON, and `condition`, λmax/λmin of C damped.

    Args:
        module: the layer.
        part: of the spectrum, what was decomposed, from `sampled_spectrum`; {} where that was
            something else than W·C.
        whole: the whole one, where a budget asked for it; it is taken instead.
        condition: what its log condition is of; only "ratio" tells λmax/λmin.
    """
    outputs, inputs = linear_shape(module)
    note: dict[str, Any] = {"shape": [outputs, inputs], "spectrum": part or None}
    if whole is not None:
        values = whole.singular_values
        note["spectrum"] = sampled_spectrum(values, 0, values.numel())
        if condition == "ratio":
            ratio = math.exp(whole.log_condition) / math.sqrt(outputs)
            note["condition"] = float(f"{ratio:.4g}")
    return note
