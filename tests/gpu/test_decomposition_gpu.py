"""Decompositions on a GPU, against float64 references on the CPU."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from svd_cases import (
    adapter_error,
    realistic_covariance,
    reference,
    tail_energy_ratio,
)
from torch import Tensor

from corda_kernels import co_svd, co_svd_layers, regularized_inverse
from corda_kernels.kernels import use_backend
from corda_kernels.linalg import End, extreme_eigenvalues, layers, singular_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Dense; iterated with both factors kept, square and tall; slender; wide.
SHAPES = [(192, 192), (768, 768), (900, 768), (1536, 576), (576, 1536)]


def layer(out: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=generator) / width**0.5
    return W, realistic_covariance(width, generator)


def check(U: Tensor, W: Tensor, C: Tensor, which: End, damping: float | None) -> None:
    U, rank = U.cpu(), U.shape[-1]
    truth = reference(W, C, damping)
    if which == "largest":
        assert adapter_error(U @ (U.mT @ truth.W), truth, which, rank) <= 1e-5
    else:
        assert tail_energy_ratio(U, truth) <= 1.001


@pytest.mark.parametrize("damping", [0.01, None])
@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ends_against_float64(
    shape: tuple[int, int], which: End, damping: float | None
) -> None:
    W, C = layer(*shape)
    found = co_svd(W.cuda(), C.cuda(), rank=16, which=which, damping=damping)
    assert found.U.is_cuda
    check(found.U, W, C, which, damping)


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_both_methods(method: Literal["exact", "randomized"], which: End) -> None:
    W, C = layer(320, 384)
    found = co_svd(W.cuda(), C.cuda(), rank=8, which=which, method=method, damping=0.01)
    check(found.U, W, C, which, 0.01)


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_layers_in_batches_are_what_each_is_alone(which: End) -> None:
    shapes = [(768, 768), (768, 768), (768, 768), (1536, 576), (1536, 576)]
    pairs = {str(i): layer(*shape, seed=i) for i, shape in enumerate(shapes)}
    weights = {name: W.cuda() for name, (W, _) in pairs.items()}
    covariances = {name: C.cuda() for name, (_, C) in pairs.items()}
    found = dict(co_svd_layers(weights, covariances, rank=16, which=which, damping=0.01))
    assert found.keys() == pairs.keys()
    for name, (W, C) in pairs.items():
        check(found[name].U, W, C, which, 0.01)


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_large_layers_on_streams_are_what_each_is_alone(
    which: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_SMALL", 0)  # every layer by itself
    made = [layer(400, 512, seed=seed) for seed in range(12)]
    caller = torch.cuda.Stream()
    with torch.cuda.stream(caller):
        torch.cuda._sleep(100_000_000)  # weights that are not there yet
        weights = {str(i): W.cuda(non_blocking=True) * 1 for i, (W, _) in enumerate(made)}
        covariances = {str(i): C.cuda(non_blocking=True) * 1 for i, (_, C) in enumerate(made)}
        found = {}
        options: dict[str, Any] = {"rank": 8, "which": which, "damping": 0.01}
        for name, part in co_svd_layers(weights, covariances, **options):
            torch.cuda._sleep(20_000_000)  # results that are read later than the next are made
            found[name] = part.U * 1
            del part
        caller.synchronize()
    for name, U in found.items():
        alone = co_svd(weights[name], covariances[name], rank=8, which=which, damping=0.01)
        cosines = torch.linalg.svdvals(U.mT @ alone.U)
        assert float(cosines.min()) >= 1 - 1e-6


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_without_the_cuda_kernels(which: End) -> None:
    W, C = layer(768, 768)
    with use_backend("reference"):
        found = co_svd(W.cuda(), C.cuda(), rank=16, which=which)
    check(found.U, W, C, which, None)


def test_null_directions_are_ordered_by_the_exact_method() -> None:
    W, C = layer(600, 600)
    C[100:130], C[:, 100:130] = 0, 0
    found = co_svd(W.cuda(), C.cuda(), rank=16, which="smallest")
    check(found.U, W, C, "smallest", None)


def test_two_sided_variant() -> None:
    W, C = layer(300, 420)
    _, D = layer(8, 300, seed=1)
    options = {"rank": 12, "power": 0.5, "damping": 0.01}
    ours = co_svd(W.cuda(), C.cuda(), output_covariance=D.cuda(), **options)
    plain = co_svd(W, C, output_covariance=D, **options)
    torch.testing.assert_close(ours.S.cpu(), plain.S, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_regularized_inverse(dtype: torch.dtype) -> None:
    C = torch.stack([layer(1, 512, seed)[1] for seed in range(3)]).to(dtype)
    C[1] = torch.eye(512)
    C[2, :5], C[2, :, :5] = 0, 0
    ours = regularized_inverse(C.cuda(), damping=0.01)
    exact = C.double()
    exact.diagonal(dim1=-2, dim2=-1).add_(0.01 * exact.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None])
    identity = ours.inverse.double().cpu() @ exact
    allowed = 1e6 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        identity, torch.eye(512).double().expand(3, -1, -1), rtol=0, atol=allowed
    )
    least = regularized_inverse(C.cuda())
    assert least.damping.cpu()[1] == 0
    assert bool(least.inverse.isfinite().all())


@pytest.mark.parametrize("d", [300, 2500])
def test_extreme_eigenvalues(d: int) -> None:
    C = layer(1, d)[1].double()
    C.diagonal().add_(1e-4 * C.diagonal().mean())
    exact = torch.linalg.eigvalsh(C)
    largest, smallest = extreme_eigenvalues(C.cuda())
    assert float(largest) == pytest.approx(float(exact[-1]), rel=1e-2)
    assert float(smallest) == pytest.approx(float(exact[0]), rel=1e-2)


def test_singular_values() -> None:
    W, C = layer(200, 320)
    found = singular_values(W.cuda(), C.cuda(), damping=0.01)
    truth = reference(W, C, 0.01)
    torch.testing.assert_close(found.cpu(), truth.S, rtol=1e-7, atol=1e-12 * float(truth.S[0]))
