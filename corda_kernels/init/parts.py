"""Calibration on a part of the text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from corda_kernels.calibration import CovarianceSet, calibrate
from corda_kernels.calibration.batches import Batch, token_count
from corda_kernels.errors import (
    BatchError,
    LeftOutWarning,
    NonFiniteActivationError,
    PaddingWarning,
)


def calibrate_part(
    model: nn.Module, batches: Sequence[Batch], part: int, parts: int, **options: Any
) -> CovarianceSet:
    """Calibrates on every `parts`-th batch from number `part` on.

    Args:
        model: see `calibrate`.
        batches: see `calibrate`.
        part: from 0; what the first warned of the others do not say again.
        parts: how many there are.
        options: of `calibrate`.

    Raises:
        NonFiniteActivationError: a layer received NaN or Inf; counted in all batches.
        BatchError: a batch is malformed; counted in all batches.
        CalibrationError: see `calibrate`.
    """
    try:
        with warnings.catch_warnings():
            if part:
                warnings.simplefilter("ignore", LeftOutWarning)
                warnings.simplefilter("ignore", PaddingWarning)
            return calibrate(model, batches[part::parts], **options)
    except BatchError as error:
        raise BatchError(parts * error.batch + part, error.reason) from error
    except NonFiniteActivationError as error:
        index = parts * error.batch + part
        before = sum(token_count(batch) for batch in batches[:index])
        tokens = (before, before + token_count(batches[index]))
        raise NonFiniteActivationError(
            error.layer, index, tokens, error.broken, error.channels
        ) from error
