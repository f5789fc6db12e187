from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Calibrated, Make
from pairs import pairs
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

from corda_kernels import (
    CompactnessPenalty,
    CovarianceSet,
    DriftPenalty,
    calibrate,
    load_for_training,
    save_adapter,
)
from corda_kernels.adapter import LayerAdapter, adapter_of
from corda_kernels.calibration import Covariance
from corda_kernels.errors import AdapterError, ConfigError, CovarianceError
from corda_kernels.linears import linear_weight

RANK = 16
SOME = ["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"]


# Each penalty with the forms of the adapter that it is for.
KINDS = pytest.mark.parametrize(
    ("kind", "form"),
    [
        (DriftPenalty, {}),
        (DriftPenalty, {"residual": "weight"}),
        (CompactnessPenalty, {"residual": "weight"}),
    ],
    ids=["drift", "drift-weight", "compactness"],
)
FORMS: list[dict[str, Any]] = [{}, {"hold": 8}, {"residual": "weight"}]


def change(layer: LayerAdapter) -> Tensor:
    """ΔW in float64."""
    delta = layer.scaling * layer.B.double() @ layer.A.double()
    if layer.initial is not None:
        delta -= layer.initial.B.double() @ layer.initial.A.double()
    return delta


def drift(model: nn.Module, covariances: CovarianceSet) -> float:
    """Σ tr(ΔW C ΔWᵀ), formed in float64."""
    total = 0.0
    for name, layer in adapter_of(model).layers.items():
        delta = change(layer)
        total += float((delta @ covariances[name].matrix.double() @ delta.T).trace())
    return total


def damped(C: Tensor, share: float) -> Tensor:
    C = C.double()
    return C + share * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture
def plain_lora(calibrated: Calibrated) -> Callable[..., tuple[Any, CovarianceSet]]:
    """A tiny model with PEFT's own LoRA."""

    def make(**options: Any) -> tuple[Any, CovarianceSet]:
        model, covariances = calibrated()
        options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
        return get_peft_model(model, LoraConfig(**options)), covariances

    return make


@pytest.mark.parametrize(
    ("form", "mode", "use_peft", "architecture"),
    pairs(FORMS, ["kpm", "ipm"], [True, False], ["llama", "gpt2"]),
    ids=str,
)
def test_drift_is_the_mean_squared_change_of_the_outputs(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    mode: str,
    form: dict[str, Any],
    use_peft: bool,
    architecture: str,
) -> None:
    start = calibrated(architecture)
    covariances = start[1]
    model = train(adapt(start, use_peft=use_peft, mode=mode, **form))
    penalty = DriftPenalty(model, covariances)
    expected = drift(model, covariances)
    assert expected > 1e-2
    assert penalty().item() == pytest.approx(expected, rel=1e-5)
    assert set(penalty.layers) == set(covariances)
    assert DriftPenalty(model, covariances)().item() == penalty().item()
    before = penalty().item()
    train(model, 1)
    assert penalty().item() == pytest.approx(drift(model, covariances), rel=1e-5)
    assert penalty().item() != before


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("use_peft", [True, False])
def test_drift_and_its_gradient_are_nothing_at_the_start(
    calibrated: Calibrated, adapt: Make, form: dict[str, Any], use_peft: bool
) -> None:
    start = calibrated()
    model = adapt(start, use_peft=use_peft, **form)
    value = DriftPenalty(model, start[1])()
    value.backward()
    assert value.item() == 0
    assert len(trained(model)) == 28
    assert all(not parameter.grad.any() for parameter in trained(model))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_small_change_does_not_drown_in_rounding(
    calibrated: Calibrated, adapt: Make, form: dict[str, Any]
) -> None:
    start = calibrated()
    model = adapt(start, **form)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(1e-5 * parameter.abs().mean() * torch.randn_like(parameter))
    expected = drift(model, start[1])
    assert 0 < expected < 1e-6
    assert DriftPenalty(model, start[1])().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_drift_is_measured_on_what_was_calibrated(
    calibrated: Calibrated, adapt: Make, train: Make, mode: str
) -> None:
    """On the text itself: the mean over tokens of ‖ΔW x‖², with the x of the untouched model."""
    plain, _ = calibrated()
    batches = [torch.randint(3, 64, (4, 16))]
    covariances = calibrate(plain, batches, progress=False)
    model = train(adapt((copy.deepcopy(plain), covariances), mode=mode))
    layers = adapter_of(model).layers
    found: dict[str, float] = {}

    def measure(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            moved = args[0].double().flatten(0, 1) @ change(layers[name]).T
            found[name] = float(moved.square().sum(1).mean())

        return hook

    for name in layers:
        plain.get_submodule(name).register_forward_pre_hook(measure(name))
    with torch.no_grad():
        plain(input_ids=batches[0])
    assert len(found) == 14
    assert DriftPenalty(model, covariances)().item() == pytest.approx(sum(found.values()), rel=1e-4)


def test_drift_of_a_plain_lora_counts_from_the_base(
    plain_lora: Callable[..., tuple[Any, CovarianceSet]], train: Make
) -> None:
    model, covariances = plain_lora()
    assert DriftPenalty(model, covariances)().item() == 0
    train(model)
    expected = 0.0
    for name, covariance in covariances.items():
        lora = model.get_base_model().get_submodule(name)
        A, B = (getattr(lora, key)["default"].weight.detach() for key in ("lora_A", "lora_B"))
        delta = 2 * B.double() @ A.double()
        expected += float((delta @ covariance.matrix.double() @ delta.T).trace())
    assert DriftPenalty(model, covariances)().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compactness_is_at_the_start_what_the_adapter_holds_of_the_spectrum(
    calibrated: Calibrated, adapt: Make, use_peft: bool, architecture: str
) -> None:
    plain, covariances = calibrated(architecture)
    expected = 0.0
    for name, covariance in covariances.items():
        W = linear_weight(plain.get_submodule(name)).detach().double()
        S = torch.linalg.svdvals(W @ damped(covariance.matrix, 0.01))
        expected += float(S[-RANK:].sum() / S[0])
    # k_proj has no more components; the base is then left without any.
    options = {"mode": "kpm", "rank": RANK, "residual": "weight"}
    model = adapt((plain, covariances), use_peft=use_peft, **options)
    assert CompactnessPenalty(model, covariances)().item() == pytest.approx(expected, rel=1e-5)


def test_compactness_bounds_the_nuclear_norm(
    calibrated: Calibrated, adapt: Make, train: Make
) -> None:
    plain, covariances = calibrated()
    model = adapt((copy.deepcopy(plain), covariances), mode="kpm", residual="weight")
    penalty = CompactnessPenalty(model, covariances)
    first = penalty().item()
    train(model)
    norm = 0.0
    for name, layer in adapter_of(model).layers.items():
        C = damped(covariances[name].matrix, 0.01)
        W = linear_weight(plain.get_submodule(name)).detach().double()
        product = layer.B.double() @ layer.A.double() @ C
        norm += float(torch.linalg.matrix_norm(product, "nuc") / torch.linalg.svdvals(W @ C)[0])
    assert norm > 1.1 * first
    assert penalty().item() >= norm


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("use_peft", [True, False])
def test_gradients_are_those_of_the_value(
    calibrated: Calibrated, adapt: Make, train: Make, kind: Any, form: Any, use_peft: bool
) -> None:
    start = calibrated()
    options = {"mode": "kpm", "rank": 2, "targets": SOME} | form
    model = train(adapt(start, use_peft=use_peft, **options)).double()
    penalty = kind(model, start[1])
    value = penalty()
    assert value.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *_: penalty(), trained(model))


@KINDS
@pytest.mark.parametrize("use_peft", [True, False])
def test_only_the_adapter_gets_gradients(
    calibrated: Calibrated, adapt: Make, train: Make, kind: Any, form: Any, use_peft: bool
) -> None:
    start = calibrated()
    model = train(adapt(start, use_peft=use_peft, mode="kpm", **form))
    expected = {name for name, value in model.named_parameters() if value.requires_grad}
    model.requires_grad_(True)
    model.zero_grad()
    kind(model, start[1])().backward()
    found = {name for name, value in model.named_parameters() if value.grad is not None}
    assert found == expected
    assert not any(covariance.matrix.requires_grad for covariance in start[1].values())


@pytest.mark.slow
@KINDS
def test_a_penalty_in_the_loss_holds_its_quantity_down(
    calibrated: Calibrated, adapt: Make, kind: Any, form: Any
) -> None:
    found = {}
    for strength in (0.0, 10.0):
        start = calibrated()
        model = adapt(start, mode="kpm", **form)
        penalty = kind(model, start[1])
        optimizer = torch.optim.Adam(trained(model), lr=1e-3)
        ids = torch.arange(3, 63).view(4, 15)
        for _ in range(5):
            (model(input_ids=ids, labels=ids).loss + strength * penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[strength] = penalty().item()
    assert found[10.0] < 0.9 * found[0.0]


@KINDS
def test_autocast_changes_nothing(
    calibrated: Calibrated, adapt: Make, train: Make, kind: Any, form: Any
) -> None:
    start = calibrated()
    penalty = kind(train(adapt(start, mode="kpm", **form)), start[1])
    with torch.autocast("cpu", torch.bfloat16):
        inside = penalty()
    assert torch.equal(inside, penalty())


@KINDS
def test_narrow_factors_are_computed_with_in_float32(
    calibrated: Calibrated, adapt: Make, train: Make, kind: Any, form: Any
) -> None:
    start = calibrated()
    model = train(adapt(start, mode="kpm", targets=SOME, **form)).bfloat16()
    value = kind(model, start[1])()
    assert value.dtype == torch.float32
    wide = kind(model.float(), start[1])()
    assert value.item() == pytest.approx(wide.item(), rel=1e-5)


@KINDS
def test_an_adapter_from_its_folder_is_penalised_alike(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path, kind: Any, form: Any
) -> None:
    start = calibrated()
    model = train(adapt(start, mode="kpm", **form))
    save_adapter(model, tmp_path)
    again = load_for_training(calibrated()[0], tmp_path, use_peft=False)
    expected = kind(model, start[1])().item()
    assert kind(again, start[1])().item() == pytest.approx(expected, rel=1e-6)


@KINDS
def test_layers_without_inputs_or_weights_give_finite_gradients(
    calibrated: Calibrated, adapt: Make, kind: Any, form: Any
) -> None:
    plain, covariances = calibrated()
    dead, empty = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    changed = dict(covariances)
    changed[dead] = dataclasses.replace(
        covariances[dead], matrix=torch.zeros_like(covariances[dead].matrix)
    )
    nn.init.zeros_(plain.get_submodule(empty).weight)
    start = plain, CovarianceSet(changed)
    model = adapt(start, mode="kpm", damping=None, **form)
    penalty = kind(model, start[1])
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.01)
    value = penalty()
    value.backward()
    assert value.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in trained(model))


@KINDS
def test_a_layer_without_covariance_is_named(
    calibrated: Calibrated, adapt: Make, kind: Any, form: Any
) -> None:
    start = calibrated()
    model = adapt(start, mode="kpm", **form)
    lacking = {name: entry for name, entry in start[1].items() if "down_proj" not in name}
    with pytest.raises(
        CovarianceError,
        match=r"no covariance for the adapted layer model\.layers\.0\.mlp\.down_proj and 1 more: ",
    ):
        kind(model, CovarianceSet(lacking))


def test_a_covariance_of_another_size_is_refused(calibrated: Calibrated, adapt: Make) -> None:
    start = calibrated()
    model = adapt(start)
    name, other = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    wrong: dict[str, Covariance] = dict(start[1]) | {name: start[1][other]}
    with pytest.raises(CovarianceError, match=rf"layer {name} has 48 inputs, .* 32 channels"):
        DriftPenalty(model, CovarianceSet(wrong))()


def test_compactness_of_an_ipm_adapter_is_refused(calibrated: Calibrated, adapt: Make) -> None:
    start = calibrated()
    with pytest.raises(ConfigError, match="in mode ipm it never exceeds"):
        CompactnessPenalty(adapt(start, mode="ipm", residual="weight"), start[1])()


def test_compactness_of_a_plain_lora_is_refused(
    plain_lora: Callable[..., tuple[Any, CovarianceSet]], calibrated: Calibrated, adapt: Make
) -> None:
    start = calibrated()
    for model, covariances in (plain_lora(), (adapt(start, mode="kpm"), start[1])):
        with pytest.raises(AdapterError, match='make the adapter with residual="weight", or use D'):
            CompactnessPenalty(model, covariances)()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "does not start at B A = 0"),
        ({"use_dora": True}, r"layer model\.layers\.0\.self_attn\.q_proj computes more than"),
        ({"target_modules": ["embed_tokens"]}, "no adapter of linear layers"),
    ],
)
def test_a_lora_that_is_not_plain_is_refused(
    plain_lora: Callable[..., tuple[Any, CovarianceSet]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        DriftPenalty(*plain_lora(**options))()


def test_several_active_adapters_are_refused(
    plain_lora: Callable[..., tuple[Any, CovarianceSet]],
) -> None:
    model, covariances = plain_lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        AdapterError, match=r"default \(LoraConfig\), other \(LoraConfig\): activate one"
    ):
        DriftPenalty(model, covariances)()


def test_models_without_a_lora_are_refused(calibrated: Calibrated) -> None:
    model, covariances = calibrated()
    with pytest.raises(AdapterError, match="carries no adapter"):
        DriftPenalty(model, covariances)()
    tuned = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match=r"default \(PrefixTuningConfig\): activate one LoRA"):
        DriftPenalty(tuned, covariances)()
