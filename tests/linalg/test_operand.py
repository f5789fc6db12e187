from __future__ import annotations

import pytest
import torch
from pairs import pairwise
from torch import Tensor

from corda_kernels.linalg.operand import Operand, near_one

ROWS, COLUMNS = 500, 300  # more rows than are converted at a time, and not a multiple


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pairwise(
    batch=[(), (2,), (2, 3)],
    of=[torch.bfloat16, torch.float16, torch.float32, torch.float64],
    into=[torch.float32, torch.float64],
)
def test_products_are_those_of_a_copy_in_their_own_dtype(
    into: torch.dtype, of: torch.dtype, batch: tuple[int, ...]
) -> None:
    matrix = random(*batch, ROWS, COLUMNS).to(of)
    X, Y = random(*batch, COLUMNS, 3).to(into), random(*batch, ROWS, 3).to(into)
    operand, copy = Operand(matrix), matrix.to(into)
    close = {"rtol": 0, "atol": 3e3 * torch.finfo(into).eps}
    for _ in range(2):
        torch.testing.assert_close(operand.times(X), copy @ X, **close)
        torch.testing.assert_close(operand.transposed_times(Y), copy.mT @ Y, **close)


@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_the_shift_is_added_to_the_diagonal(of: torch.dtype) -> None:
    matrix, shift = random(2, 500, 500).to(of), random(2, 1, 1)
    expected = matrix.double() + shift * torch.eye(500, dtype=torch.float64)
    operand, X = Operand(matrix, shift), random(2, 500, 3)
    torch.testing.assert_close(operand.double(), expected)
    torch.testing.assert_close(operand.times(X), expected @ X)
    torch.testing.assert_close(operand.transposed_times(X), expected.mT @ X)
    torch.testing.assert_close(operand.of((1,)).double(), expected[1])
    torch.testing.assert_close(operand.single().double(), expected, rtol=1e-6, atol=1e-6)


def test_the_matrix_itself_is_neither_copied_nor_changed_without_need() -> None:
    matrix = random(5, 5)
    before = matrix.clone()
    assert Operand(matrix).double() is matrix
    Operand(matrix).double(copy=True).zero_()
    Operand(matrix, torch.ones(1, 1, dtype=torch.float64)).double().zero_()
    assert torch.equal(matrix, before)
    single = matrix.float()
    assert Operand(single).single().matrix is single


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e7, 1e30, 1e200])
@pytest.mark.parametrize("shifted", [False, True])
def test_float32_neither_overflows_nor_vanishes(size: float, shifted: bool) -> None:
    matrix = size * torch.stack([random(50, 50), torch.zeros(50, 50).double()])
    shift = torch.tensor([size, 0.0], dtype=torch.float64)[:, None, None] if shifted else None
    single = Operand(matrix, shift).single()
    product, exact = single.double()[0], Operand(matrix, shift).double()[0]
    assert 1e-7 < float(product.norm()) < 1e8
    product, exact = (matrix / matrix.abs().max() for matrix in (product, exact))
    torch.testing.assert_close(product, exact, rtol=0, atol=1e-6)
    assert not single.double()[1].any()


def test_matrices_are_scaled_by_powers_of_two() -> None:
    W = torch.randn(6, 5, dtype=torch.float64)
    batch = torch.stack([W * 1e-310, W * 1e300, W * 0])
    scaled = near_one(batch)
    largest = scaled.abs().amax((-2, -1))
    assert ((largest >= 1) & (largest < 2)).tolist() == [True, True, False]
    assert not scaled[2].any()
    assert torch.frexp(scaled[1] / batch[1]).mantissa.unique().tolist() == [0.5]
