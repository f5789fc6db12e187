from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from corda_kernels.linalg.inverted import InverseOfFactors, inverse_of_product
from corda_kernels.linalg.subspace import Operator

N = 40


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*batch: int) -> Tensor:
    x = random(*batch, N, 2 * N)
    return x @ x.mT / N


def of_factors(W: Tensor, C: Tensor, *, upper: bool = False) -> InverseOfFactors:
    factors = InverseOfFactors.of(W.clone(), C.clone(), upper=upper)
    assert factors is not None
    return factors


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_factors_undo_the_product_and_its_transpose(batch: tuple[int, ...], upper: bool) -> None:
    W, C, X = random(*batch, N, N), positive(*batch), random(*batch, N, 3)
    if upper:
        W = W.triu() + 10 * torch.eye(N)
    M, factors = W @ C, of_factors(W, C, upper=upper)
    half, back = factors.operators()
    torch.testing.assert_close(M @ half(X), X, rtol=0, atol=1e-9)
    torch.testing.assert_close(M.mT @ back(X), X, rtol=0, atol=1e-9)
    rough_half, rough_back = factors.single().operators()
    for rough, fine in ((rough_half, half), (rough_back, back)):
        assert rough(X.float()).dtype == torch.float32
        assert (rough(X.float()) - fine(X)).norm() <= 1e-2 * fine(X).norm()
    # The float64 ones are not touched by the float32 ones.
    torch.testing.assert_close(M @ half(X), X, rtol=0, atol=1e-9)


def test_float32_is_hurt_by_the_condition_of_either_factor_not_of_the_product() -> None:
    torch.manual_seed(0)
    left, right, turn = (torch.linalg.qr(random(N, N)).Q for _ in range(3))
    W = (left * torch.logspace(0, -4, N).double()) @ right
    C = (turn * torch.logspace(0, -5, N).double()) @ turn.T
    assert float(torch.linalg.cond(W @ C)) > 1e6
    X = random(N, 3)
    half, _ = of_factors(W, C).single().operators()
    exact = torch.linalg.solve(W @ C, X)
    assert (half(X.float()) - exact).norm() <= 0.02 * exact.norm()
    M = (W @ C).float()  # as a product it is lost
    assert (torch.linalg.solve(M, X.float()) - exact).norm() > 0.05 * exact.norm()


def test_the_factors_take_the_place_of_the_matrices() -> None:
    W, C = random(N, N), positive()
    factors = InverseOfFactors.of(W, C, upper=False)
    assert factors is not None
    assert factors.packed.data_ptr() == W.data_ptr()
    assert factors.root.data_ptr() == C.data_ptr()


def test_a_covariance_that_cannot_be_factored_leaves_the_weight_as_it_was() -> None:
    W, C = random(2, N, N), positive(2)
    C[1, 3] = C[1, :, 3] = 0
    kept = W.clone()
    assert InverseOfFactors.of(W, C, upper=False) is None
    assert torch.equal(W, kept)


MADE: dict[str, Callable[[Tensor, Tensor], tuple[Operator, Operator]]] = {
    "product": lambda W, C: inverse_of_product(W @ C),
    "factors": lambda W, C: of_factors(W, C).operators(),
    "single": lambda W, C: of_factors(W, C).single().operators(),
    "upper": lambda W, C: of_factors(W.triu(), C, upper=True).operators(),
}


@pytest.mark.parametrize("name", MADE)
def test_a_singular_weight_gives_large_numbers_but_numbers(name: str) -> None:
    torch.manual_seed(0)
    X = torch.ones(N, 1, dtype=torch.float32 if name == "single" else torch.float64)
    for W in (random(N, 3) @ random(3, N), torch.zeros(N, N).double()):
        half, back = MADE[name](W, positive())
        assert bool(back(half(X)).isfinite().all())
