"""Chebyshev-filtered subspace iteration beside the block Krylov iteration of `co_svd`.

    python benches/chebyshev.py            # 1024 × 1024, r = 32
    python benches/chebyshev.py 2048 64

For W with Gaussian entries, and C of the tokens of Gaussian noise, whose spectrum is flat, or as in
`svd.py`. Printed are the thread's seconds, the applications of W·C or its inverse by precision,
and the error against a dense float64 SVD. Both iterations get the same products, start in float32
where the other does, and stop at the same estimate of the error.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from unittest import mock

import torch
from svd_cases import (
    DAMPING,
    adapter_error,
    realistic_covariance,
    reference,
    tail_energy_ratio,
)
from torch import Tensor

from corda_kernels.kernels import batched_svd
from corda_kernels.linalg import krylov
from corda_kernels.linalg.krylov import Stop, _error, _orthonormal, leading_pairs
from corda_kernels.linalg.operand import damped
from corda_kernels.linalg.solves import Operators

# Degrees of a filter, and rounds of filter and Rayleigh-Ritz, at the most.
_DEGREE, _ROUNDS = 12, 40


def chebyshev(
    operators: Operators,
    start: Tensor,  # (m, block)
    rank: int,
    stop: Stop,
    *,
    far: bool = False,
    draft: Operators | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `leading_pairs`. A filter damps what is below the block's smallest Ritz value.

    Source: Zhou and Saad, "A Chebyshev-Davidson algorithm for large symmetric eigenproblems", SIAM
    J. Matrix Anal. Appl. 2007, algorithm 3.1 (the scaled filter).
    """
    phases = [(operators, torch.float64, stop.tolerance)]
    if draft is not None:
        phases.insert(0, (draft, torch.float32, stop.gain * stop.tolerance))
    front = start
    for number, (pair, dtype, goal) in enumerate(phases):
        front = _orthonormal(front.to(dtype) if number else pair[1](front.to(dtype)))
        before = math.inf
        for cycle in range(_ROUNDS):
            right, triangle = torch.linalg.qr(pair[0](front))
            turn, sigma = (part.to(front) for part in batched_svd(triangle.mT.double(), exact=True))
            front, theta = front @ turn, sigma.square()
            applied = pair[1](right) @ (triangle @ turn)
            error = _error(front, applied, theta, rank, stop.least_gap)
            worst = float(error)
            stuck = dtype == torch.float32 and cycle > 2 and 0.8 * before < worst < 1e-2
            if worst <= goal or stuck:
                break
            before = worst
            # A higher degree would leave nothing of the others beside the largest, in this dtype.
            first, last = (
                math.acosh(1 + 2 * max(float(t / theta[-1] - 1), 1e-12))
                for t in (theta[0], theta[rank - 1])
            )
            most = math.log(0.1 / torch.finfo(dtype).eps) / first
            wanted = math.log(2 * worst / goal) / last + 1
            degree = max(1, int(min(_DEGREE, most, wanted)))
            front = _orthonormal(_filtered(pair, front, theta, degree))
    front, factor = torch.linalg.qr(applied)
    if far:
        front, factor = torch.linalg.qr(operators[0](front))
    left, values = batched_svd(factor, exact=True)
    return (front @ left)[:, :rank].contiguous(), values[:rank], error


def _filtered(operators: Operators, X: Tensor, theta: Tensor, degree: int) -> Tensor:
    """A polynomial of A on X, small on [0, θ of the last] and 1 at the first."""
    half, back = operators
    centre = theta[-1] / 2
    first = scale = centre / (theta[0] - centre)
    Y = (back(half(X)) - centre * X) * (first / centre)
    for _ in range(degree - 1):
        new = 1 / (2 / first - scale)
        X, Y = Y, 2 * new / centre * (back(half(Y)) - centre * Y) - scale * new * X
        scale = new
    return Y


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("size", type=int, nargs="?", default=1024)
    parser.add_argument("rank", type=int, nargs="?", default=32)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(given.size, given.size, generator=generator) / given.size**0.5
    noise = torch.randn(8 * given.size, given.size, generator=generator)
    cases = {"flat": noise.T @ noise, "realistic": realistic_covariance(given.size, generator)}
    ends = {"largest": krylov.top, "smallest": krylov.bottom}
    for case, C in cases.items():
        exact = reference(W, C, DAMPING)
        for which, end in ends.items():
            for method in (leading_pairs, chebyshev):
                applied: Counter[str] = Counter()

                def counted(operators: Operators, applied: Counter[str] = applied) -> Operators:
                    def count(X: Tensor) -> Tensor:
                        applied[str(X.dtype)] += 1
                        return X

                    half, back = operators
                    return lambda X: half(count(X)), lambda X: back(count(X))

                def iterated(operators, *rest, draft=None, method=method, **options):
                    draft = draft and counted(draft)
                    return method(counted(operators), *rest, draft=draft, **options)

                started = time.thread_time()
                with mock.patch.object(krylov, "leading_pairs", iterated):
                    random = torch.Generator().manual_seed(0)
                    U, *_ = end(W, damped(C, DAMPING), given.rank, random)
                seconds = time.thread_time() - started
                if which == "largest":
                    error = adapter_error(U @ (U.mT @ exact.W), exact, which, given.rank)
                else:
                    error = tail_energy_ratio(U, exact) - 1
                print(
                    f"{case:<10} {which:<8} {method.__name__:<13} {seconds:7.2f} s, "
                    f"{applied['torch.float32']:3} in float32, {applied['torch.float64']:3} in "
                    f"float64, error {error:.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    with torch.no_grad():
        main()
