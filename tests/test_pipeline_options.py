"""What CordaConfig passes on to PEFT, what it refuses, and models that are wrapped already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Calibrated, Logits, Make
from peft import LoraConfig
from torch import Tensor, nn

from corda_kernels import CordaConfig, init_corda
from corda_kernels.adapter import CordaLinear, adapter_of
from corda_kernels.errors import ConfigError, ModelError, TargetError
from corda_kernels.init import corda_adapter

# Options of LoraConfig that are no options here, a value of each, and the reason that is given.
RANKS = "the LoRA's ranks follow from rank, or from a budget"
LAYERS = "targets and experts choose the layers"
START = "the start is what this package makes"
BIAS = "a bias has no covariance, and the base stays as it is"
REFUSED: dict[str, tuple[Any, str]] = {
    "r": (8, RANKS),
    "rank_pattern": ({"q_proj": 2}, RANKS),
    "lora_alpha": (16, "hold sets the scaling"),
    "alpha_pattern": ({"q_proj": 2}, "hold sets the scaling"),
    "use_rslora": (True, "hold sets the scaling"),
    "target_modules": (["q_proj"], LAYERS),
    "target_parameters": (["experts"], LAYERS),
    "layers_to_transform": ([0], LAYERS),
    "layers_pattern": ("layers", LAYERS),
    "init_lora_weights": ("pissa", START),
    "loftq_config": ({}, START),
    "eva_config": (None, START),
    "corda_config": (None, START),
    "bias": ("all", BIAS),
    "lora_bias": (True, BIAS),
    "trainable_token_indices": ([1], "name the embeddings in modules_to_save"),
    "layer_replication": ([(0, 2)], "it changes what a layer's inputs are"),
    "use_qalora": (True, "it changes what a layer's inputs are"),
}
PASSED_ON = {"lora_dropout", "use_dora", "modules_to_save", "exclude_modules"}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_of_loraconfig_without_a_place_is_refused_with_the_reason(option: str) -> None:
    value, reason = REFUSED[option]
    assert option in LoraConfig.__dataclass_fields__
    with pytest.raises(
        ConfigError, match=rf"^{option} of PEFT's LoraConfig is not an option here: {reason}$"
    ):
        CordaConfig("ipm", **{option: value})
    with pytest.raises(ConfigError, match=f"^{option} of"):
        CordaConfig(mode="ipm", rank=4, **{option: None})


def test_an_option_that_nobody_has_is_refused_as_python_does() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'balance'"):
        CordaConfig("ipm", balance="even")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": -0.1}, "lora_dropout must be from 0 to below 1, got -0.1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be from 0 to below 1, got 1.0"),
        ({"lora_dropout": float("nan")}, "lora_dropout must be from 0 to below 1, got nan"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
        ({"residual": "pair"}, "residual must be None or \"weight\", got 'pair'"),
        (
            {"residual": "weight", "hold": 8},
            'residual="weight" goes with neither hold, use_dora nor lora_dropout',
        ),
        (
            {"residual": "weight", "use_dora": True},
            "nor lora_dropout, which would drop pretrained weight: leave residual at None",
        ),
        ({"hold": 0}, "hold must be positive and finite"),
    ],
)
def test_a_value_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CordaConfig("ipm", **options)


def config(**options: Any) -> CordaConfig:
    return CordaConfig("ipm", **({"rank": 4, "progress": False} | options))


def test_nothing_is_passed_on_by_default(calibrated: Calibrated) -> None:
    assert config().lora == {}
    assert corda_adapter(*calibrated(), config()).record.lora == {}


@pytest.mark.parametrize(("residual", "dropout"), [(None, 0.5), ("weight", 0.0)])
def test_options_are_passed_on_to_loraconfig_and_noted(
    calibrated: Calibrated, residual: Any, dropout: float
) -> None:
    options = {"lora_dropout": dropout, "modules_to_save": ("lm_head",)}
    model = init_corda(*calibrated(), config(residual=residual, **options))
    found = model.peft_config["default"]
    assert (found.lora_dropout, found.modules_to_save) == (dropout, ["lm_head"])
    assert not found.use_dora
    noted = {"modules_to_save": ["lm_head"]} | ({"lora_dropout": 0.5} if dropout else {})
    assert model.corda_record.lora == noted
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad


def test_dropout_acts_while_training_and_only_then(calibrated: Calibrated, train: Make) -> None:
    model = train(init_corda(*calibrated(), config(lora_dropout=0.5)))
    ids = torch.randint(3, 64, (2, 8))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dora_trains_magnitudes_and_starts_at_the_base(
    calibrated: Calibrated, train: Make, logits: Logits
) -> None:
    model = init_corda(*calibrated(), config(use_dora=True))
    expected = logits(calibrated()[0])
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    magnitudes = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
    assert len(magnitudes) == 14
    train(model)
    assert not any(torch.equal(model.get_parameter(name), magnitudes[name]) for name in magnitudes)


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (["q_proj"], {"q_proj"}),
        (["mlp.up_proj", "k_proj"], {"up_proj", "k_proj"}),
        (r".*\.mlp\..*", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_excluded_layers_get_no_adapter_and_need_no_covariance(
    calibrated: Calibrated, exclude: Any, gone: set[str], use_peft: bool
) -> None:
    model, covariances = calibrated()
    kept = {name: covariances[name] for name in covariances if name.rpartition(".")[2] not in gone}
    options = config(exclude_modules=exclude)
    adapted = init_corda(model, type(covariances)(kept), options, use_peft=use_peft)
    assert adapter_of(adapted).layers.keys() == kept.keys()
    batches = [torch.randint(3, 64, (6, 16)) for _ in range(2)]
    again = init_corda(calibrated()[0], batches, options, use_peft=use_peft)
    assert adapter_of(again).layers.keys() == kept.keys()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_option_of_peft_needs_peft(
    calibrated: Calibrated, options: dict[str, Any], name: str
) -> None:
    model, covariances = calibrated()
    with pytest.raises(ConfigError, match=f"{name} is an option of PEFT: it needs use_peft=True"):
        init_corda(model, covariances, config(**options), use_peft=False)
    assert not any(isinstance(module, CordaLinear) for module in model.modules())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, tuple[Make, str]] = {
    "OptimizedModule": (torch.compile, "_orig_mod"),
    "DataParallel": (nn.DataParallel, "module"),
    "DistributedDataParallel": (nn.parallel.DistributedDataParallel, "module"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
def test_a_wrapped_model_is_refused_before_anything_runs(
    calibrated: Calibrated, logits: Logits, kind: str
) -> None:
    wrap, inside = WRAPPERS[kind]
    model, covariances = calibrated()
    wrapped = wrap(model)
    calls: list[object] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for data in (covariances, [torch.randint(3, 64, (6, 16))]):
        for use_peft in (True, False):
            with pytest.raises(
                ModelError, match=rf"is wrapped in {kind}: .*\(model\.{inside}\) first, and wrap"
            ):
                init_corda(wrapped, data, config(), use_peft=use_peft)
    assert not calls
    adapted = init_corda(getattr(wrapped, inside), covariances, config())
    assert torch.equal(logits(adapted), logits(calibrated()[0]))


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        ("nonsuch", "names 'nonsuch', which the model does not have"),
        ("mlp", "names 'mlp', and layer model.layers.0.mlp.gate_proj in it is to be adapted"),
        ("down_proj", "layer model.layers.0.mlp.down_proj in it is to be adapted"),
    ],
)
def test_modules_to_save_are_checked_before_anything_runs(
    calibrated: Calibrated, saved: str, reason: str
) -> None:
    model, _ = calibrated()

    def batches() -> Iterator[Tensor]:
        raise AssertionError("the model was run")
        yield

    with pytest.raises(TargetError, match=reason):
        init_corda(model, batches(), CordaConfig("ipm", rank=4, modules_to_save=[saved]))


@pytest.mark.parametrize("dropout", ["x", None, -0.1, 1.0])
def test_a_dropout_that_is_none_is_refused(dropout: Any) -> None:
    with pytest.raises(ConfigError, match="lora_dropout must be from 0 to below 1"):
        CordaConfig("ipm", lora_dropout=dropout)


def test_the_published_form_takes_no_dropout() -> None:
    with pytest.raises(ConfigError, match="lora_dropout, which would drop pretrained weight"):
        CordaConfig("ipm", residual="weight", lora_dropout=0.1)
