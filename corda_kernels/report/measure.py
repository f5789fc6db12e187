"""What takes a while to compute of covariances: their spectra, and with a model those of W·C."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.covariance import Group
from corda_kernels.calibration.experts import by_parameter
from corda_kernels.errors import CovarianceError, DecompositionError
from corda_kernels.init.measured import measured_input, measured_layer, sampled_spectrum
from corda_kernels.linalg import extreme_eigenvalues, is_small, map_layers
from corda_kernels.planning.scores import layer_spectra
from corda_kernels.progress import progress_bar

# Up to this many channels all eigenvalues are computed; beyond, only the extreme ones.
_DENSE_SIZE = 2048
# In mean eigenvalues, added where the smallest cannot be told from zero: rounding in float32 leaves
# less than -1e-4 of the mean in place of zero even where the largest is a thousand times the mean.
_SHIFT = 1e-2


@torch.no_grad()
def measure_inputs(covariances: CovarianceSet) -> list[dict[str, Any]]:
    """Of every distinct covariance what `measured_input` gives, and its spectrum, as JSON.

    Those of single experts, of which there may be thousands, are left out.

    Returns:
        For each besides: `largest` and `smallest` eigenvalue over their mean, the smallest 0 where
        C is singular to working precision; `effective_rank`, (Σλ)²/Σλ²; and up to 2048 channels
        `spectrum`, over the mean eigenvalue. Only the effective rank where C is zero.

    Raises:
        DecompositionError: a covariance is not finite, or, beyond 2048 channels, has eigenvalues
            below -1 % of their mean; the message names the layer.
    """
    own = {name for names in by_parameter(covariances).values() for name in names}
    groups = [(part, names) for part, names in covariances.groups() if names[0] not in own]
    notes = map_layers(_measured, groups, [is_small(part.matrix) for part, _ in groups])
    bar = progress_bar(notes, description="spectra", unit="covariances", total=len(groups))
    found = {note["layers"][0]: note for note in bar}
    return [found[names[0]] for _, names in groups]


def _measured(group: Group) -> dict[str, Any]:
    covariance, names = group
    note = measured_input(covariance, names)
    matrix = covariance.matrix.double()
    channels, mean = len(matrix), float(matrix.diagonal().mean())
    if not mean:
        return note | {"effective_rank": 0.0}
    if not bool(matrix.isfinite().all()):
        raise DecompositionError(
            f"layer {names[0]}: its covariance holds NaN or Inf: calibrate again"
        )
    scaled = matrix / mean
    note["effective_rank"] = channels**2 / float(scaled.square().sum())
    if channels <= _DENSE_SIZE:
        values = torch.linalg.eigvalsh(scaled).flip(-1)
        largest, smallest = float(values[0]), float(values[-1])
        note["spectrum"] = sampled_spectrum(values.clamp_min(0), 0, channels)
    else:
        try:
            largest, smallest = map(float, extreme_eigenvalues(scaled))
        except DecompositionError:
            scaled.diagonal().add_(_SHIFT)
            try:
                largest, smallest = float(extreme_eigenvalues(scaled)[0]) - _SHIFT, 0.0
            except DecompositionError as error:
                raise DecompositionError(
                    f"layer {names[0]}: its covariance has negative eigenvalues: calibrate again"
                ) from error
    singular = smallest <= torch.finfo(scaled.dtype).eps * largest
    return note | {"largest": largest, "smallest": 0.0 if singular else smallest}


def measure_spectra(
    modules: Mapping[str, nn.Module], covariances: CovarianceSet, *, damping: float | None
) -> dict[str, dict[str, Any]]:
    """Shape, condition of C and whole spectrum of W·C, damped, by layer, as JSON.

    Raises:
        CovarianceError: no module has a covariance.
        DecompositionError: a covariance does not fit its layer or is not finite.
    """
    covered = {name: module for name, module in modules.items() if name in covariances}
    if not covered:
        raise CovarianceError(
            "the covariances cover none of the model's layers: give the model that they come from"
        )
    spectra = layer_spectra(covered, covariances, damping=damping or 0.0, progress=True)
    return {name: measured_layer(covered[name], {}, spectra[name], "ratio") for name in spectra}
