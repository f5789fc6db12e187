"""Adapters are folded into the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import BUDGET
from kinds import Calibrated, Logits, Make
from transformers import AutoModelForCausalLM

from corda_kernels import CordaConfig, export_lora, load_for_training, merge, save_adapter
from corda_kernels.adapter import adapter_of
from corda_kernels.adapter.attaching import subtract_initial
from corda_kernels.adapter.model import residual_marker
from corda_kernels.errors import AdapterError
from corda_kernels.init import corda_adapter
from corda_kernels.linears import linear_weight

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning"),
    # PEFT looks for the base to see whether its embeddings have another size.
    pytest.mark.filterwarnings("ignore:Could not find a config file in residual of:UserWarning"),
]


@pytest.mark.parametrize(
    ("architecture", "options", "use_peft"),
    [
        ("llama", BUDGET | {"hold": 3}, True),
        ("llama", {"residual": "weight"} | BUDGET, False),
        ("llama", {"residual": "weight"}, True),
        ("gpt2", {"hold": 8}, True),
        ("gpt2", {"residual": "weight"}, False),
        ("qwen2", {"mode": "kpm"}, False),
        ("gemma2", {"residual": "weight"}, True),
        ("mixtral", {"hold": 8}, True),
    ],
)
def test_a_merge_is_a_plain_model(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    same_logits: Callable[..., bool],
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
    use_peft: bool,
) -> None:
    model = train(adapt(calibrated(architecture), use_peft=use_peft, **options))
    save_adapter(model, tmp_path / "adapter")
    merged = merge(load_for_training(calibrated(architecture)[0], tmp_path / "adapter"))
    untouched, _ = calibrated(architecture)
    assert type(merged) is type(untouched)
    assert merged.state_dict().keys() == untouched.state_dict().keys()
    assert residual_marker(merged) is None
    merged.save_pretrained(tmp_path / "merged")
    assert "corda" not in (tmp_path / "merged" / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded), logits(merged))
    assert same_logits(logits(reloaded), model)


@pytest.mark.parametrize(
    ("residual", "use_peft"), [(None, True), (None, False), ("weight", True), ("weight", False)]
)
def test_a_merge_rounds_the_weights_once(
    calibrated: Calibrated, adapt: Make, train: Make, residual: str | None, use_peft: bool
) -> None:
    model, covariances = calibrated()
    model = train(adapt((model.bfloat16(), covariances), use_peft=use_peft, residual=residual))
    layers = adapter_of(model).layers
    merged = merge(model)
    for name, layer in layers.items():
        base = linear_weight(calibrated()[0].bfloat16().get_submodule(name)).float()
        if layer.initial is not None:
            base = (base - layer.initial.product()).bfloat16()
        found = linear_weight(merged.get_submodule(name))
        # Summed in another order in float32, a few entries round to the other side.
        assert (found != (base + layer.product()).bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize(("use_peft", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_an_untrained_merge_gives_the_base_back_exactly(
    calibrated: Calibrated, adapt: Make, use_peft: bool, dtype: torch.dtype
) -> None:
    model, covariances = calibrated()
    untouched = calibrated()[0].to(dtype)
    merged = merge(adapt((model.to(dtype), covariances), use_peft=use_peft))
    for name, value in merged.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name])


def test_an_untrained_merge_of_the_published_form_gives_the_base_back_but_for_rounding(
    calibrated: Calibrated, adapt: Make
) -> None:
    untouched, _ = calibrated()
    merged = merge(adapt(calibrated(), residual="weight"))
    for name, value in merged.state_dict().items():
        expected = untouched.state_dict()[name]
        assert (value - expected).norm() <= torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_stored_residual_base_is_merged_to_the_same(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path, use_peft: bool
) -> None:
    model, covariances = calibrated()
    config = CordaConfig("ipm", rank=4, residual="weight", progress=False)
    adapter = corda_adapter(model, covariances, config)
    assert adapter.initial is not None
    subtract_initial(model, adapter.initial)
    model.save_pretrained(tmp_path / "base")
    save_adapter(train(adapt(calibrated(), residual="weight")), tmp_path / "adapter")
    on_residual, on_untouched = (
        merge(load_for_training(base, tmp_path / "adapter", use_peft=use_peft)).state_dict()
        for base in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            calibrated()[0],
        )
    )
    assert all(torch.equal(on_residual[name], on_untouched[name]) for name in on_untouched)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_peft_itself_can_merge(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    same_logits: Callable[..., bool],
    options: dict[str, Any],
) -> None:
    model = train(adapt(calibrated(), **options))
    trained = logits(model)
    assert same_logits(trained, model.merge_and_unload())


def test_a_model_without_adapter_is_not_merged(calibrated: Calibrated) -> None:
    with pytest.raises(AdapterError, match="the model carries no adapter to merge"):
        merge(calibrated()[0])


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_training_that_diverged_is_not_merged(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, use_peft: bool
) -> None:
    model = adapt(calibrated(), use_peft=use_peft)
    name = "model.layers.1.mlp.up_proj"
    trained = [p for n, p in model.named_parameters() if name in n and p.requires_grad]
    trained[0].data[0, 0] = torch.inf
    save_adapter(model, tmp_path / "saved")  # nothing is lost
    for use in (
        lambda: merge(model),
        lambda: export_lora(tmp_path / "saved", tmp_path / "out"),
        lambda: load_for_training(calibrated()[0], tmp_path / "saved"),
    ):
        with pytest.raises(AdapterError, match=rf"layer {name} .* not finite: .*diverged"):
            use()
