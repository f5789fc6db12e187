"""kernels.batched_svd as it runs without a GPU: the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_kernels.kernels import available_backends, batched_svd, reference

DTYPES = [torch.float32, torch.float64]


def orthonormal(U: Tensor) -> float:
    identity = torch.eye(U.shape[-1], dtype=torch.float64)
    return float((U.double().mT @ U.double() - identity).abs().max())


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0)]),
    l=st.sampled_from([0, 1, 2, 7, 20]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_svd_of_any_batch(
    shape: tuple[int, ...], l: int, dtype: torch.dtype, transposed: bool
) -> None:
    t = torch.randn(*shape, l, l, dtype=dtype)
    t = t.mT if transposed else t
    U, S = batched_svd(t)
    assert (U.shape, S.shape, U.dtype, S.dtype) == (t.shape, t.shape[:-1], dtype, dtype)
    if t.numel():
        torch.testing.assert_close(S, torch.linalg.svdvals(t.double()).to(dtype))
        assert orthonormal(U) <= 50 * torch.finfo(dtype).eps
        rows = (U.mT @ t).norm(dim=-1)
        torch.testing.assert_close(rows, S, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_nan_and_nothing_else(bad: float) -> None:
    t = torch.randn(3, 4, 4)
    expected = batched_svd(t)
    t[1, 2, 3] = bad
    for found, clean in zip(batched_svd(t), expected, strict=True):
        assert found.isnan().flatten(1).all(-1).tolist() == [False, True, False]
        assert torch.equal(found[::2], clean[::2])


def test_gram_svd_is_right_down_to_the_root_of_eps() -> None:
    Q, _ = torch.linalg.qr(torch.randn(2, 30, 30, dtype=torch.float64))
    exact = torch.logspace(0, -15, 30, dtype=torch.float64)
    t = Q * exact @ Q.flip(0).mT
    for scale in (1.0, 1e-200, 1e200):  # squares out of range
        U, S = reference.gram_svd(scale * t)
        assert orthonormal(U) <= 1e-14
        assert bool((S.diff() <= 0).all())
        assert float((S / scale - exact).abs().max()) <= 1e-8
        large = exact > 1e-4
        torch.testing.assert_close(
            (S / scale)[:, large], exact[large].expand(2, -1), rtol=1e-9, atol=0
        )
        top = exact > 1e-5
        overlap = (Q[..., top].mT @ U[..., top]).abs().diagonal(dim1=-2, dim2=-1)
        assert float((1 - overlap).abs().max()) <= 1e-9


def test_gram_svd_of_zeros() -> None:
    U, S = reference.gram_svd(torch.zeros(2, 3, 3, dtype=torch.float64))
    assert orthonormal(U) <= 1e-15
    assert torch.equal(S, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(3, 3, dtype=torch.float16)]
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(\*batch, l, l\) in float32 or float64"):
        batched_svd(bad)


def test_backends_are_listed_by_operation() -> None:
    assert set(available_backends("batched_svd")) == {"reference", "cuda"}
    assert set(available_backends("syrk_")) == {"reference", "cpu", "triton", "sm90"}
    assert set(available_backends()) == {"reference", "cpu", "triton", "cuda", "sm90"}


def test_kernels_for_nvidia_do_not_run_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = {name: "ROCm" in (reason or "") for name, reason in available_backends().items()}
    assert found == {"reference": False, "cpu": False, "triton": True, "cuda": True, "sm90": True}
