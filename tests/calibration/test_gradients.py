"""D and Ḡ against autograd's own, in float64, sequence by sequence and token by token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corda_kernels import CovarianceSet, calibrate
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.errors import (
    BatchError,
    CalibrationError,
    ConfigError,
    CovarianceError,
    CovarianceFileError,
    ModelError,
)

BOTH: dict[str, Any] = {"sides": "both", "progress": False}


def batches() -> list[Any]:
    """Whole sequences, padding on either side, and labels for a part of the tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 64, (2, 9), generator=generator) for _ in range(3)]
    right, left = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)
    right[0, 6:] = 0
    left[1, :4] = 0
    labels = ids[2].clone()
    labels[:, :5] = -100
    labels[left == 0] = -100
    return [
        ids[0],
        {"input_ids": ids[1], "attention_mask": right},
        {"input_ids": ids[2], "attention_mask": left, "labels": labels},
    ]


def sequences(batch: Any) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each sequence, without padding."""
    batch = batch if isinstance(batch, dict) else {"input_ids": batch}
    ids = batch["input_ids"]
    kept = batch.get("attention_mask", torch.ones_like(ids)).bool()
    labels = batch.get("labels", ids)
    return [(row[mask], label[mask]) for row, mask, label in zip(ids, kept, labels, strict=True)]


def by_autograd(model: nn.Module, given: list[Any], targets: list[str]) -> dict[str, Any]:
    """D, Ḡ and E[‖g‖² ‖x‖²], token by token and by weight gradients of the summed loss."""
    model = copy.deepcopy(model).double().eval()
    modules = {name: model.get_submodule(name) for name in targets}
    found: dict[str, Any] = {name: [0.0, None, 0.0] for name in targets}
    passed: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in modules.items():

        def keep(_: Any, args: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            passed[name] = args[0], output

        module.register_forward_hook(keep)
    tokens = 0
    for ids, labels in (pair for batch in given for pair in sequences(batch)):
        tokens += len(ids)
        logits = model(input_ids=ids[None]).logits[0]
        cross_entropy(logits[:-1], labels[1:], reduction="sum").backward()
        for name, (inputs, output) in passed.items():
            for x, g in zip(inputs[0].detach(), output.grad[0], strict=True):
                found[name][0] = found[name][0] + torch.outer(g, g)
                found[name][2] += (g @ g) * (x @ x)
    for name, module in modules.items():
        weight = module.weight.grad  # gradients of all sequences are summed up there
        found[name][1] = weight if isinstance(module, nn.Linear) else weight.T
    return {name: [part / tokens for part in parts] for name, parts in found.items()}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_both_sides_are_those_of_autograd(tiny_model: Make, architecture: str) -> None:
    model = tiny_model(architecture, initializer_range=0.1).double()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    found = calibrate(model, batches(), **BOTH)
    expected = by_autograd(model, batches(), list(found))
    for name, exact in expected.items():
        for ours, theirs in zip(found.gradients[name].tensors, exact, strict=True):
            assert ours.dtype == torch.float64
            assert close(ours, theirs), name
    plain = calibrate(model, batches(), progress=False)
    assert all(close(found[name].matrix, plain[name].matrix) for name in plain)
    assert not plain.gradients
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sums_are_of_float32_where_activations_are_narrower(tiny_model: Make) -> None:
    model = tiny_model("llama", initializer_range=0.1).bfloat16()
    found = calibrate(model, batches(), **BOTH)
    exact = calibrate(copy.deepcopy(model).double(), batches(), **BOTH)
    for name, gradient in found.gradients.items():
        assert gradient.matrix.dtype == gradient.mean.dtype == torch.float32
        error = gradient.matrix.double() - exact.gradients[name].matrix
        assert error.norm() <= 0.05 * exact.gradients[name].matrix.norm()


def test_sampled_labels_are_the_models_own_and_give_the_fisher_matrix(
    tiny_model: Make,
) -> None:
    # A model of one position a sequence: D of the head is E over x of diag(p) − p pᵀ.
    model = tiny_model("llama", initializer_range=0.3, vocab_size=8).double()
    ids = torch.randint(3, 8, (4000, 1))
    found = calibrate(model, [ids], targets="lm_head", labels="sampled", **BOTH)
    with torch.no_grad():
        p = model(input_ids=ids).logits[:, 0].softmax(-1)
    expected = torch.diag(p.mean(0)) - p.T @ p / len(p)
    D = found.gradients["lm_head"].matrix
    assert float((D - expected).norm() / expected.norm()) < 0.05
    # The mean gradient is 0 but for the error of sampling, √(tr D · tr C / n), whatever the text.
    error = D.trace() * found["lm_head"].matrix.trace() / len(ids)
    assert float(found.gradients["lm_head"].mean.norm()) < 1.5 * float(error.sqrt())
    again = calibrate(model, [ids], targets="lm_head", labels="sampled", **BOTH)
    assert torch.equal(again.gradients["lm_head"].matrix, D)


def test_sequences_of_two_lengths_draw_their_own_labels() -> None:
    from corda_kernels.calibration.gradients import _drawn, _seed

    logits = torch.zeros(1, 40, 50)
    first, second = (
        _drawn(logits, torch.Generator().manual_seed(_seed(3, length))) for length in (40, 41)
    )
    assert (first == second).float().mean() < 0.3


def test_sampled_labels_stay_where_labels_are(tiny_model: Make) -> None:
    model = tiny_model("llama", initializer_range=0.1).double()
    ids = torch.randint(3, 64, (2, 9))
    labels = torch.where(torch.arange(9) == 4, ids, -100)
    batch = {"input_ids": ids, "labels": labels}
    found = calibrate(model, [batch], targets="lm_head", labels="sampled", **BOTH)
    # Only the logits of token 3 have a loss: two gradients in all.
    assert int(torch.linalg.matrix_rank(found.gradients["lm_head"].matrix)) == 2


def test_it_is_saved_loaded_and_merged_with_the_covariances(
    tiny_model: Make, tmp_path: Path
) -> None:
    model = tiny_model("llama", initializer_range=0.1)
    first, second = (calibrate(model, part, **BOTH) for part in (batches()[:1], batches()[1:]))
    first.save(tmp_path / "file")
    read = CovarianceSet.load(tmp_path / "file")
    assert read.gradients.keys() == first.keys()
    assert read.provenance["labels"] == "given"
    for name, gradient in first.gradients.items():
        assert all(map(torch.equal, read.gradients[name].tensors, gradient.tensors))
    whole, merged = calibrate(model, batches(), **BOTH), read.merge(second)
    for name, gradient in whole.gradients.items():
        for ours, theirs in zip(merged.gradients[name].tensors, gradient.tensors, strict=True):
            assert close(ours, theirs.double())
    with pytest.raises(CovarianceError, match="same sides and labels"):
        first.merge(calibrate(model, batches(), progress=False))


def test_a_file_with_an_odd_gradient_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    found = calibrate(tiny_model("llama"), batches(), **BOTH)
    name = next(iter(found))
    found.gradients[name].mean[0, 0] = torch.nan
    found.save(tmp_path / "file")
    with pytest.raises(CovarianceFileError, match=r"the gradient of .* holds NaN"):
        CovarianceSet.load(tmp_path / "file")


class Killed(BaseException):
    pass


def test_an_interrupted_run_goes_on_to_the_same_bits(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model("gpt2", initializer_range=0.1)
    expected = calibrate(model, batches(), labels="sampled", **BOTH)

    def until_two() -> Any:
        yield from batches()[:2]
        raise Killed

    kept = CalibrationCheckpoint(tmp_path / "run", every=1)
    with pytest.raises(Killed):
        calibrate(model, until_two(), labels="sampled", checkpoint=kept, **BOTH)
    resumed = CalibrationCheckpoint(tmp_path / "run", every=1, resume=True)
    found = calibrate(model, batches(), labels="sampled", checkpoint=resumed, **BOTH)
    for name, gradient in expected.gradients.items():
        assert all(map(torch.equal, found.gradients[name].tensors, gradient.tensors))


def test_what_gives_no_gradients_is_refused(tiny_model: Make) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 64, (2, 9))
    with pytest.raises(CalibrationError, match=r"no token has a loss.*masked"):
        calibrate(model, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}], **BOTH)
    for labels, says in ((ids[:, 1:], "shape"), (ids + 64, "label .* tokens are 0 to 63")):
        with pytest.raises(BatchError, match=says):
            calibrate(model, [{"input_ids": ids, "labels": labels}], **BOTH)
    with pytest.raises(ModelError, match="needs a causal language model"):
        calibrate(model.model, [ids], **BOTH)
    with pytest.raises(ConfigError, match="sides"):
        calibrate(model, [ids], sides="outputs", progress=False)
    with pytest.raises(ConfigError, match="averages over tokens"):
        calibrate(model, [ids], normalize="peft", **BOTH)


def test_tokens_that_do_not_count_are_in_no_mean(tiny_model: Make) -> None:
    model = tiny_model("llama", initializer_range=0.1).double().eval()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    counted, name = ids % 3 > 0, "model.layers.1.self_attn.q_proj"
    batch = {"input_ids": ids, "token_mask": counted}
    found = calibrate(model, [batch], targets=[name], **BOTH).gradients[name]
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(args[0].detach()[counted])
        output.register_hook(lambda gradient: seen.append(gradient[counted]))

    model.get_submodule(name).register_forward_hook(keep)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    x, g = seen
    assert close(found.matrix, g.T @ g / len(g))
    assert close(found.mean, g.T @ x / len(g))
    assert close(found.fisher_trace, (g.square().sum(1) * x.square().sum(1)).mean())
