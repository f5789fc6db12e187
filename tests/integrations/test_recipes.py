"""The scripts under examples/recipes, each against a plain statement of its method in float64.

The code on the recipes page runs as it stands.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels import load_model, load_tokenizer, token_batches

ROOT = Path(__file__).parents[2]

# The text is shorter than what the scripts read of a real one.
pytestmark = pytest.mark.filterwarnings("ignore::corda_kernels.errors.DataWarning")


@dataclass
class Base:
    """A model, a text for calibration, and what each layer reads, (tokens, in) float64."""

    folder: Path
    text: Path
    model: nn.Module
    seen: dict[str, Tensor]  # of the text
    new: dict[str, Tensor]  # of another one


@pytest.fixture(scope="module")
def base(
    tiny_model: Callable[..., nn.Module],
    save_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Base:
    """Its norms make a few channels large, as those of real models do."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model("llama", initializer_range=0.1, max_position_embeddings=128)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[:3] = 20
    model.save_pretrained(folder)
    save_tokenizer(folder)
    words = [f"w{word}" for word in torch.randint(60, (4096,)).tolist()]
    (folder / "text.txt").write_text(" ".join(words[:2048]))
    (folder / "new.txt").write_text(" ".join(words[2048:]))
    seen, new = (inputs(model, folder, folder / f"{name}.txt") for name in ("text", "new"))
    return Base(folder, folder / "text.txt", model, seen, new)


def inputs(model: nn.Module, folder: Path, text: Path) -> dict[str, Tensor]:
    raw: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: raw.setdefault(name, []).append(args[0].flatten(0, 1))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for batch in token_batches(text, load_tokenizer(folder), samples=64, seq_len=128):
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in raw.items()}


def ran(
    name: str, base: Base, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], nn.Module]:
    """What a script defines, and the model that it writes."""
    monkeypatch.setattr("sys.argv", [name, str(base.folder), str(base.text), str(out)])
    scope = runpy.run_path(str(ROOT / "examples" / "recipes" / f"{name}.py"))
    return scope, load_model(out)


def weights(name: str, *models: nn.Module) -> list[Tensor]:
    return [model.get_submodule(name).weight.detach().double() for model in models]


def error(W: Tensor, other: Tensor, X: Tensor) -> float:
    return float(((W - other) @ X.T).norm())


def optimal_brain_quantised(W: Tensor, H: Tensor, step: Tensor) -> Tensor:
    """Column by column, the inverse Hessian of the columns left computed anew each time."""
    W = W.clone()
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        rounded = (W[:, j] / step).round().clamp(-7, 7) * step
        delta = (rounded - W[:, j]) / inverse[0, 0]
        W[:, j:] += torch.outer(delta, inverse[0])
    return W


def test_gptq_is_optimal_brain_quantisation_and_beats_rounding_to_nearest(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope, model = ran("gptq", base, tmp_path, monkeypatch)
    for name, X in base.seen.items():
        W, made = weights(name, base.model, model)
        H = 2 * X.T @ X / len(X)
        step = W.abs().amax(1) / 7
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        expected = optimal_brain_quantised(W, damped, step)
        torch.testing.assert_close(scope["gptq"](W, H), expected)
        nearest = (W / step[:, None]).round() * step[:, None]
        new = base.new[name]
        # Its H sums float32 products: a weight halfway between two steps may go either way.
        assert error(W, made, new) < 1.05 * error(W, expected, new), name
        assert error(W, made, new) < 0.9 * error(W, nearest, new), name


def test_svd_llm_loses_what_no_matrix_of_its_rank_keeps(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = ran("svd_llm", base, tmp_path, monkeypatch)
    for name, X in base.seen.items():
        W, made = weights(name, base.model, model)
        rank = int(0.8 * W.numel() / sum(W.shape))
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        plain = (U[:, :rank] * sigma[:rank]) @ Vh[:rank]
        least = float(torch.linalg.svdvals(W @ X.T)[rank:].norm())
        assert torch.linalg.matrix_rank(made, rtol=1e-5) == rank
        assert error(W, made, X) < 1.0001 * least < 0.99 * error(W, plain, X), name


def test_wanda_zeroes_the_smallest_weights_times_norms(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = ran("wanda", base, tmp_path, monkeypatch)
    for name, X in base.seen.items():
        W, made = weights(name, base.model, model)
        scores = W.abs() * (X.T @ X).diagonal().sqrt()
        kept = scores > scores.median(dim=1, keepdim=True).values
        assert torch.equal(made, W * kept), name


def in_8_bits(x: Tensor) -> Tensor:
    step = x.abs().max() / 127
    return (x / step).round() * step


def test_smoothquant_computes_the_same_and_quantises_better(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = ran("smoothquant", base, tmp_path, monkeypatch)
    ids = torch.randint(3, 60, (4, 50))
    with torch.no_grad():
        expected, found = (each(input_ids=ids).logits for each in (base.model, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    for name, X in base.new.items():
        W, made = weights(name, base.model, model)
        if name.endswith(("o_proj", "down_proj")):
            assert torch.equal(made, W), name
            continue
        scale = (made / W).median(0).values
        exact = X @ W.T
        plain = (in_8_bits(X) @ in_8_bits(W).T - exact).norm()
        assert (in_8_bits(X / scale) @ in_8_bits(made).T - exact).norm() < 0.8 * plain, name


def test_the_code_on_the_page_runs(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(base.folder)
    Path("my-text.txt").symlink_to(base.text)
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(block, "recipes.md", "exec"), scope)
    assert scope["A"].shape == (16, 32)
