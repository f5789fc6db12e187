"""Numbers and masks are taken whatever library or dtype they come from."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from wrong_arguments import C, W, batch, config

import corda_kernels as ck
from corda_kernels.arguments import real_number, whole_number
from corda_kernels.errors import BatchError, ConfigError


def test_an_option_that_is_not_allowed_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="hold must be"):
        config(hold=0)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind_are_taken(value: Any) -> None:
    assert type(config(rank=value).rank) is int
    assert whole_number("n", value, 1) == 3
    assert len(ck.co_svd(W, C, rank=value).S) == 3


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), Fraction(1, 2), torch.tensor(0.5)])
def test_real_numbers_of_any_kind_are_taken(value: Any) -> None:
    assert real_number("x", value, "at least 0", lambda x: x >= 0) == 0.5
    assert torch.equal(
        ck.co_svd(W, C, rank=2, damping=value).S, ck.co_svd(W, C, rank=2, damping=0.5).S
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_ones_and_zeros_have_any_dtype(dtype: torch.dtype, calibrated: Any) -> None:
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5]).to(dtype)
    model, _ = calibrated()
    found = ck.calibrate(model, [batch(attention_mask=mask)], progress=False)
    assert found.provenance["tokens"] == 13
    with pytest.raises(BatchError, match=r"batch 1 .* other values than 1 .*\(mask == 0\)"):
        ck.calibrate(model, [batch(), batch(attention_mask=mask.float() - 1)], progress=False)
