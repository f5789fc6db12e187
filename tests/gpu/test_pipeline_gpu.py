"""Calibration and adapters on a GPU, against the same on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kinds import Make
from torch import Tensor, nn

from corda_kernels import CordaConfig, CovarianceSet, calibrate, calibrate_blocks, init_corda
from corda_kernels.errors import OutOfMemoryWarning

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.RankDeficientWarning"),
]

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "head_dim": 32,
    "initializer_range": 0.1,
}


def batches(device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (4, 48), generator=generator).to(device) for _ in range(6)]


@pytest.fixture
def plain_sums() -> Iterator[None]:
    """Float32 forward passes without tf32, so that a GPU's activations are a CPU's."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def assert_close(ours: CovarianceSet, others: CovarianceSet, allowed: float) -> None:
    assert set(ours) == set(others)
    for name in ours:
        a, b = ours[name], others[name]
        expected = b.matrix.double().cpu()
        error = (a.matrix.double().cpu() - expected).norm() / expected.norm()
        assert float(error) <= allowed, name
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.absmax.cpu(), b.absmax.cpu(), rtol=20 * allowed, atol=0)


@pytest.mark.usefixtures("plain_sums")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_covariances_are_those_of_a_cpu(tiny_model: Make, architecture: str) -> None:
    sizes = {} if architecture == "gpt2" else SIZES
    model = tiny_model(architecture, **sizes)
    options: dict[str, Any] = {"progress": False, "targets": r"(model|transformer)\..*"}
    expected = calibrate(model, batches(), **options)
    found = calibrate(copy.deepcopy(model).cuda(), batches(), **options)
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_give_the_covariances_of_one_pass(tiny_model: Make, dtype: torch.dtype) -> None:
    model = tiny_model("llama", **SIZES).to("cuda", dtype)
    whole = calibrate(model, batches("cuda"), progress=False)
    parts: dict[str, Any] = {}
    for block in calibrate_blocks(model, batches("cuda"), progress=False):
        parts |= dict(block)
    assert set(parts) == set(whole)
    for name, part in parts.items():
        expected = whole[name].matrix
        assert float((part.matrix - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [{}, {"hold": 8}, {"residual": "weight"}], ids=str)
def test_an_adapter_leaves_the_outputs_as_they_were(
    tiny_model: Make, mode: str, use_peft: bool, dtype: torch.dtype, form: dict[str, Any]
) -> None:
    model = tiny_model("llama", **SIZES).to("cuda", dtype)
    ids = batches("cuda")[0]
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
    config = CordaConfig(mode, rank=8, progress=False, **form)
    adapted = init_corda(model, batches("cuda"), config, use_peft=use_peft)
    with torch.no_grad():
        after = adapted(input_ids=ids).logits.float()
    if "residual" not in form:
        assert torch.equal(after, before)
        return
    allowed = 1e-2 if dtype == torch.float32 else 1e-1
    assert float((after - before).norm() / before.norm()) <= allowed


def test_layers_of_several_ranks_under_a_budget(tiny_model: Make) -> None:
    model = tiny_model("llama", **SIZES).cuda()
    config = CordaConfig("kpm", budget="r=8", progress=False)
    adapted = init_corda(model, batches("cuda"), config)
    assert adapted(input_ids=batches("cuda")[0]).logits.isfinite().all()


def test_memory_that_runs_out_leads_to_smaller_batches(tiny_model: Make) -> None:
    model = tiny_model("llama", **SIZES, max_position_embeddings=512, vocab_size=4096).cuda()
    ids = torch.randint(3, 64, (512, 512), device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    # Attention and the MLP of all sequences at once need more than what is left.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (600 << 20)) / total)
    try:
        with pytest.warns(OutOfMemoryWarning):
            found = calibrate(model, [ids], progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(found[name].tokens == 512 * 512 for name in found)


@pytest.mark.parametrize("blockwise", [False, True])
def test_sums_that_do_not_fit_are_made_on_the_host(tiny_model: Make, blockwise: bool) -> None:
    model = tiny_model("llama", **SIZES | {"intermediate_size": 8192}).cuda()
    ids = torch.randint(3, 64, (2, 64))
    expected = {name: matrix.cpu() for name, matrix in _matrices(model, ids, False).items()}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    # A covariance of 8,192 channels takes 256 MiB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (200 << 20)) / total)
    try:
        with pytest.warns(OutOfMemoryWarning, match="that the CPU sums up"):
            found = _matrices(model, ids, blockwise)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        # On the GPU float32 is multiplied in parts.
        assert (matrix.cpu() - expected[name]).norm() < 1e-4 * expected[name].norm(), name
    assert any(matrix.device.type == "cpu" for matrix in found.values())


def _matrices(model: nn.Module, ids: Tensor, blockwise: bool) -> dict[str, Tensor]:
    calibrated = calibrate_blocks if blockwise else calibrate
    found = calibrated(model, [ids], progress=False)
    sets = [found] if isinstance(found, CovarianceSet) else found
    return {name: part[name].matrix for part in sets for name in part}
