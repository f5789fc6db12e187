"""D and Ḡ of every expert, against autograd's own in float64, token by token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import FAMILIES, distance, made, text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode

from corda_kernels import CovarianceSet, calibrate, calibrate_blocks
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration.needs import calibration_needs, covariance_bytes
from corda_kernels.errors import ConfigError
from corda_kernels.experts import expert_parameters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning"),
    pytest.mark.filterwarnings("ignore:no token was routed"),
]
EACH: dict[str, Any] = {"experts": "each", "sides": "both", "progress": False}
PRODUCTS = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)


class Watch(TorchFunctionMode):
    """Keeps what every product with an expert's weight reads, and its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {
            id(getattr(each.module, each.attribute)): name
            for name, each in expert_parameters(model).items()
        }
        self.seen: list[tuple[str, int, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            x, weight = args[:2]
            whole = weight if weight._base is None else weight._base
            if id(whole) in self.names:
                found.retain_grad()
                name = self.names[id(whole)]
                if x.ndim == 3:  # Llama 4: all tokens to all experts, zero where they do not belong
                    for expert in range(len(whole)):
                        rows = x[expert].detach().norm(dim=-1) > 0
                        self.seen.append((name, expert, x[expert], found, rows))
                else:
                    expert = weight.storage_offset() // whole[0].numel()
                    self.seen.append((name, expert, x, found, torch.ones(len(x)).bool()))
        return found


def by_autograd(model: nn.Module, batches: list[Tensor]) -> dict[str, list[list[Any]]]:
    """For each expert of each parameter its tokens, Σ g gᵀ and Σ g xᵀ, by the eager model."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"
    sums = {
        name: [
            [0, torch.zeros(each.outputs, each.outputs), torch.zeros(each.outputs, each.inputs)]
            for _ in range(each.experts)
        ]
        for name, each in expert_parameters(model).items()
    }
    for ids in batches:
        with Watch(model) as watch:
            logits = model(ids).logits
        cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="sum").backward()
        for name, expert, x, output, rows in watch.seen:
            gradient = output.grad if output.ndim == 2 else output.grad[expert]
            for token in torch.where(rows)[0]:
                g, entry = gradient[token], sums[name][expert]
                entry[0] += 1
                entry[1] = entry[1] + torch.outer(g, g)
                entry[2] = entry[2] + torch.outer(g, x[token].detach())
    return sums


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_experts_gradients_are_autograds(kind: str) -> None:
    model, batches = made(kind).double(), text(2)
    found = calibrate(model, batches, **EACH)
    size = 0
    # Routers compute in float32, through which gradients pass.
    for name, entries in by_autograd(model, batches).items():
        total = sum(tokens for tokens, _, _ in entries)
        D, mean = (sum(entry[i] for entry in entries) / total for i in (1, 2))
        for e, (tokens, squares, products) in enumerate(entries):
            each = f"{name}.{e}"
            assert found[each].tokens == tokens
            gradient = found.gradients[each]
            assert distance(gradient.matrix, (squares + D) / (tokens + 1)) < 1e-6, each
            assert distance(gradient.mean, (products + mean) / (tokens + 1)) < 1e-6, each
            size += 4 * (gradient.matrix.numel() + gradient.mean.numel())
    model.config._experts_implementation = "eager"  # the default has no float64
    linears = [name for name in found.gradients if ".experts." not in name]
    plain = calibrate(model, batches, targets=linears, sides="both", progress=False)
    for name in linears:
        assert distance(found.gradients[name].mean, plain.gradients[name].mean) < 1e-6
        assert distance(found.gradients[name].matrix, plain.gradients[name].matrix) < 1e-6
    size += calibration_needs(model, linears, seq_len=0).gradient_bytes
    assert size == calibration_needs(model, None, "each", seq_len=0).gradient_bytes


def test_block_by_block_they_are_those_of_one_pass() -> None:
    model, batches = made("qwen3_moe"), text(2)
    whole, blocks = calibrate(model, batches, **EACH), calibrate_blocks(model, batches, **EACH)
    found = {name: part for block in blocks for name, part in block.gradients.items()}
    assert found.keys() == whole.gradients.keys()
    for name, gradient in found.items():
        for ours, theirs in zip(gradient.tensors, whole.gradients[name].tensors, strict=True):
            assert distance(ours, theirs) < 1e-5, name


def test_masked_tokens_do_not_count_and_an_expert_without_tokens_has_the_mean(
    tmp_path: Path,
) -> None:
    model, (ids,) = made("qwen3_moe", num_experts=32).double(), text(1)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    masked = {"input_ids": ids, "token_mask": mask.long()}
    found, plain = (calibrate(model, [batch], **EACH) for batch in (masked, ids))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    unseen = [e for e in range(32) if not found[f"{name}.{e}"].tokens]
    assert len(unseen) > 1
    found.save(tmp_path / "file")
    loaded = CovarianceSet.load(tmp_path / "file").gradients
    assert all(torch.equal(loaded[each].mean, g.mean) for each, g in found.gradients.items())
    assert sum(found[f"{name}.{e}"].tokens for e in range(32)) == 2 * int(mask.sum())
    gradients = [found.gradients[f"{name}.{e}"] for e in range(32)]
    tokens = [found[f"{name}.{e}"].tokens for e in range(32)]
    # (nₑ Ḡₑ + Ḡ)/(nₑ + 1) summed up with nₑ + 1, less Ḡ as often as an expert has tokens.
    mean = gradients[unseen[0]].mean
    seen = [(n, g.mean) for n, g in zip(tokens, gradients, strict=True) if n]
    total = sum((n + 1) * each for n, each in seen) - len(seen) * mean
    assert distance(total / sum(tokens), mean) < 1e-10
    assert distance(mean, plain.gradients[f"{name}.{unseen[0]}"].mean) > 1e-3


def test_a_resumed_run_and_its_file_have_them(tmp_path: Path) -> None:
    model, batches = made("gpt_oss"), text(3)
    checkpoint = CalibrationCheckpoint(tmp_path / "kept", every=1, resume=True)
    whole = calibrate(model, batches, **EACH)
    calibrate(model, batches[:2], checkpoint=checkpoint, **EACH)
    calibrate(model, batches, checkpoint=checkpoint, **EACH).save(tmp_path / "resumed")
    loaded = CovarianceSet.load(tmp_path / "resumed")
    assert loaded.gradients.keys() == whole.gradients.keys() >= {*whole}
    for name, gradient in whole.gradients.items():
        assert all(map(torch.equal, loaded.gradients[name].tensors, gradient.tensors)), name
    with pytest.raises(ConfigError, match=r'give experts="each", or leave .*experts'):
        calibrate(model, batches, **EACH | {"experts": "shared"})


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_block_by_block_they_are_the_same(kind: str) -> None:
    model, batches = made(kind, num_hidden_layers=2), text(2)
    whole = calibrate(model, batches, **EACH)
    seen = 0
    for block in calibrate_blocks(model, batches, **EACH):
        for name, gradient in block.gradients.items():
            exact = whole.gradients[name]
            for ours, theirs in zip(gradient.tensors, exact.tensors, strict=True):
                assert distance(ours, theirs.double()) < 1e-5, name
            seen += 1
    assert seen == len(whole.gradients)
    needed, _ = covariance_bytes(model, None, "each", "both")
    parts = [
        4 * (gradient.matrix.numel() + gradient.mean.numel())
        for gradient in whole.gradients.values()
    ] + [4 * len(part.matrix) ** 2 for part, _ in whole.groups()]
    assert needed == sum(parts)
