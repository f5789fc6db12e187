from __future__ import annotations

import pytest
import torch

from corda_kernels.calibration.covariance import pack_symmetric, unpack_symmetric


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", range(41))
def test_round_trip_is_exact_and_half_the_size(d: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(d, d, dtype=dtype)
    matrix = matrix + matrix.T
    packed = pack_symmetric(matrix)
    assert packed.shape == (d * (d + 1) // 2,)
    assert packed.dtype == dtype
    assert torch.equal(unpack_symmetric(packed, d), matrix)


@pytest.mark.parametrize("d", [1, 6, 7])
def test_only_the_lower_triangle_is_read(d: int) -> None:
    lower = torch.randn(d, d).tril()
    unspecified = torch.full((d, d), torch.nan).triu(1)
    assert torch.equal(
        unpack_symmetric(pack_symmetric(lower + unspecified), d), lower + lower.tril(-1).T
    )


@pytest.mark.parametrize("d", [1, 6, 7])
def test_a_matrix_of_any_strides_can_be_packed(d: int) -> None:
    matrix = torch.randn(d, 2 * d)[:, ::2]
    assert torch.equal(pack_symmetric(matrix), pack_symmetric(matrix.contiguous()))


@pytest.mark.parametrize("d", [1, 6, 7])
def test_a_matrix_can_be_unpacked_into_another(d: int) -> None:
    packed = pack_symmetric(torch.randn(d, d))
    into = torch.full((d, d), torch.nan)
    assert unpack_symmetric(packed, d, out=into) is into
    assert torch.equal(into, unpack_symmetric(packed, d))


def test_packing_leaves_the_matrix_alone() -> None:
    matrix = torch.randn(7, 7)
    before = matrix.clone()
    pack_symmetric(matrix)
    assert torch.equal(matrix, before)
