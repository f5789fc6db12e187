from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import Calibrated, Logits, Make
from pairs import pairs
from torch import Tensor, nn

from corda_kernels import CordaConfig, CovarianceSet, calibrate, init_corda
from corda_kernels.adapter import adapter_of
from corda_kernels.calibration import Covariance
from corda_kernels.errors import (
    ConfigError,
    CordaError,
    CovarianceError,
    DecompositionError,
    LeftOutWarning,
    NonFiniteActivationError,
    RankDeficientWarning,
    RankError,
    TargetError,
)
from corda_kernels.init import corda_adapter
from corda_kernels.linears import linear_weight

FIRST = "model.layers.0.self_attn.q_proj"


def config(mode: Any = "ipm", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"rank": 4, "stability": True, "progress": False} | options))


def random_batches(count: int = 4, rows: int = 4, length: int = 16) -> list[Tensor]:
    return [torch.randint(3, 64, (rows, length)) for _ in range(count)]


# Every family that differs in how its layers are made or tied.
MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("qwen2", {}),
    ("gemma2", {}),
    ("mixtral", {}),
]
FORMS: list[dict[str, Any]] = [{}, {"hold": 8}, {"residual": "weight"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mode", "form", "use_peft"),
    pairs(MODELS, ["kpm", "ipm"], FORMS, [True, False]),
    ids=str,
)
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_the_start_is_the_base(
    calibrated: Calibrated,
    logits: Logits,
    same_logits: Callable[..., bool],
    family: tuple[str, dict[str, Any]],
    mode: str,
    form: dict[str, Any],
    use_peft: bool,
) -> None:
    architecture, changes = family
    model, covariances = calibrated(architecture, **changes)
    untouched = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    adapted = init_corda(model, covariances, config(mode, **form), use_peft=use_peft)

    if "residual" in form:
        assert same_logits(logits(adapted), untouched)
    else:
        assert torch.equal(logits(adapted), logits(untouched))
    layers = adapter_of(adapted).layers
    assert list(layers) == list(covariances)
    for name, before in untouched.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or layer.initial is None:
            assert "residual" not in form or layer is None
            assert torch.equal(parameters[name], before), name
        else:
            product = layer.initial.B.double() @ layer.initial.A.double()
            product = product.T if architecture == "gpt2" else product
            distance = (parameters[name] - (before.double() - product)).norm()
            # One rounding of W', and those of a product of rank 4 in float32.
            assert distance < torch.finfo(torch.float32).eps * before.norm(), name
            assert product.norm() > 0.05 * before.norm(), name
    trainable = {id(p) for p in adapted.parameters() if p.requires_grad}
    factors = {id(p) for p in adapted.parameters()} - {id(p) for p in parameters.values()}
    assert trainable == factors
    assert len(factors) == 2 * len(layers)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_components_are_the_weights_part_at_its_end_of_the_spectrum(
    calibrated: Calibrated, architecture: str, mode: str, form: dict[str, Any]
) -> None:
    model, covariances = calibrated(architecture)
    adapter = corda_adapter(model, covariances, config(mode, damping=0.01, **form))
    for name, layer in adapter.layers.items():
        weight = linear_weight(model.get_submodule(name)).detach().double()
        C = covariances[name].matrix.double()
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
        U, S, _ = torch.linalg.svd(weight @ C, full_matrices=False)
        chosen = slice(None, 4) if mode == "ipm" else slice(-4, None)
        expected = U[:, chosen] @ U[:, chosen].T @ weight
        if layer.initial is not None:
            product = layer.initial.product()
        else:
            hold = form.get("hold", 1)
            P, S0 = layer.B[:, :4].double(), layer.A[4:].double()
            assert not layer.B[:, 4:].any()
            assert not layer.A[:4].any()
            assert layer.scaling == 1 / hold
            lengths = torch.cat([P.norm(dim=0), S0.norm(dim=1)])
            torch.testing.assert_close(lengths, torch.full_like(lengths, hold / 3**0.5))
            columns = P / P.norm(dim=0)
            parts = columns.T @ weight
            # By what P's rounding to float32 changes them, which is much of a tiny part.
            scaled = S0 * (parts.norm(dim=1) / S0.norm(dim=1))[:, None]
            assert (scaled - parts).norm() < 1e-6 * weight.norm()
            product = columns @ parts
        assert (product - expected).norm() < 1e-6 * weight.norm()
        noted = adapter.record.layers[name]
        assert noted.sigma_max == pytest.approx(float(S[chosen][0]), rel=1e-6)
        assert noted.sigma_min == pytest.approx(float(S[chosen][-1]), rel=1e-6)


def test_batches_and_their_covariances_lead_to_the_same_adapter(
    calibrated: Calibrated, same_components: Callable[..., bool]
) -> None:
    model, _ = calibrated()
    batches = random_batches()
    covariances = calibrate(model, batches, progress=False)
    found = [
        corda_adapter(model, data, config(stability=stability))
        for data, stability in (
            (covariances, True),
            (batches, False),
            (iter(batches), True),
            ([{"input_ids": ids} for ids in batches], True),
        )
    ]
    for adapter in found[1:]:
        assert adapter.layers.keys() == found[0].layers.keys()
        for name, layer in adapter.layers.items():
            assert same_components(layer, found[0].layers[name], 1e-4), name


def test_making_an_adapter_leaves_the_model_alone(calibrated: Calibrated) -> None:
    model, _ = calibrated()
    model.train()
    before = copy.deepcopy(model.state_dict())
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    corda_adapter(model, random_batches(), config(residual="weight"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(name, id(m), m.training) for name, m in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert getattr(model.config, "corda_residual", None) is None


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.ConvergenceWarning")
def test_a_seed_makes_it_repeatable(
    calibrated: Calibrated, same_components: Callable[..., bool], mode: str, method: Any
) -> None:
    model, covariances = calibrated()
    torch.manual_seed(1)
    first, second, other = (
        corda_adapter(model, covariances, config(mode, method=method, seed=seed))
        for seed in (3, 3, 4)
    )
    assert first.record == second.record
    for name, layer in first.layers.items():
        assert torch.equal(layer.A, second.layers[name].A), name
        assert torch.equal(layer.B, second.layers[name].B), name
        assert same_components(other.layers[name], layer, 0.01), name


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("use_peft", [True, False])
def test_the_record_says_how_it_was_made(
    calibrated: Calibrated, use_peft: bool, form: dict[str, Any]
) -> None:
    model, _ = calibrated()
    source = model.name_or_path
    options = config("kpm", rank=3, damping=0.02, **form)
    record = adapter_of(init_corda(model, random_batches(), options, use_peft=use_peft)).record
    noted = {name: getattr(record, name) for name in ("mode", "rank", "residual", "damping")}
    assert noted == {name: getattr(options, name) for name in noted}
    assert record.hold == (None if "residual" in form else form.get("hold", 1.0))
    assert record.lora == {}
    assert record.base["source"] == record.calibration["model"] == source
    assert {"corda_kernels", "torch", "transformers", "peft"} <= record.versions.keys()
    assert "stability" not in record.calibration
    assert record.stability["rank"] == 3
    assert record.stability["tokens"] == (128, 128)
    assert record.stability["layers"].keys() == record.layers.keys()
    assert len(record.layers) == 14
    for entry in record.layers.values():
        assert list(dataclasses.asdict(entry)) == [
            "rank",
            "tokens",
            "sigma_max",
            "sigma_min",
            "residual",
        ]
        assert (entry.rank, entry.tokens) == (3, 256)
        assert entry.sigma_max > entry.sigma_min > 0
        assert entry.residual == 0.0


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        (
            {"rank": 33},
            r"layer model\.layers\.0\.self_attn\.k_proj \(16 × 32\): choose one between 1 and 16, "
            "or leave the layer out",
        ),
        (
            {"rank": 20, "targets": ["k_proj", "q_proj"]},
            r"layer model\.layers\.0\.self_attn\.k_proj \(16 × 32\): .*between 1 and 16",
        ),
    ],
)
def test_an_impossible_rank_is_found_before_the_model_runs(
    calibrated: Calibrated, options: dict[str, Any], layer: str
) -> None:
    model, _ = calibrated()
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    with pytest.raises(RankError, match=layer):
        init_corda(model, random_batches(), config(**options))
    with pytest.raises(RankError, match=r"min_rank 5 needs .* the budget holds"):
        init_corda(model, random_batches(), config(budget="r=4", min_rank=5))
    with pytest.raises(TargetError, match="no linear layer matches targets"):
        init_corda(model, random_batches(), config(targets=["nothing"]))
    assert not calls


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "other"},
        {"residual": "none"},
        {"residual": "pair"},
        {"hold": 0},
        {"hold": -1.0},
        {"hold": float("inf")},
        {"hold": float("nan")},
        {"hold": True},
        {"lora_dropout": 1},
        {"lora_dropout": -0.1},
        {"method": "fast"},
        {"rank": 0},
        {"rank": 4.0},
        {"candidates": 0},
        {"min_rank": -1},
        {"max_rank": 1.5},
        {"rank_multiple": 0},
        {"damping": -0.1},
        {"damping": float("inf")},
        {"damping": float("nan")},
    ],
)
def test_an_option_that_is_not_allowed_is_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"^{name} must be .*, got {value!r}$"):
        CordaConfig(**({"mode": "ipm"} | options))


@pytest.mark.parametrize("options", [{"hold": 2}, {"use_dora": True}])
def test_the_published_form_has_neither_hold_nor_dora(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="goes with neither hold, use_dora nor"):
        config(residual="weight", **options)


LORA: dict[str, Any] = {
    "lora_dropout": 0.25,
    "use_dora": True,
    "modules_to_save": ["embed_tokens"],
}


@pytest.mark.parametrize("name", LORA)
def test_options_of_peft_are_passed_on_and_need_it(calibrated: Calibrated, name: str) -> None:
    model, covariances = calibrated()
    options = config(**{name: LORA[name]})
    with pytest.raises(ConfigError, match=f"{name} is an option of PEFT: it needs use_peft=True"):
        init_corda(model, covariances, options, use_peft=False)
    adapted: Any = init_corda(model, covariances, options)
    assert getattr(adapted.peft_config["default"], name) == LORA[name]
    assert adapted.corda_record.lora == {name: LORA[name]}


@pytest.mark.parametrize("given", ["batches", "covariances"])
def test_excluded_layers_are_neither_calibrated_nor_adapted(
    calibrated: Calibrated, given: str
) -> None:
    model, covariances = calibrated()
    data = covariances if given == "covariances" else random_batches()
    options = config(exclude_modules=["v_proj", "0.mlp.down_proj"])
    record = corda_adapter(model, data, options).record
    expected = [
        name
        for name in covariances
        if not name.endswith("v_proj") and name != "model.layers.0.mlp.down_proj"
    ]
    assert len(expected) == 11
    assert list(record.layers) == expected
    if given == "batches":
        read = {name for note in record.measured["inputs"] for name in note["layers"]}
        assert read == set(expected)


def test_bounds_that_leave_no_rank_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="raise max_rank to 8"):
        config(budget="r=4", max_rank=4, rank_multiple=8)


def without(covariances: CovarianceSet, name: str, **options: Any) -> CovarianceSet:
    return CovarianceSet({k: v for k, v in covariances.items() if k != name}, **options)


def test_covariances_of_another_model_are_refused(calibrated: Calibrated) -> None:
    model, covariances = calibrated()
    narrow = calibrated(intermediate_size=40)[1]
    cases = [
        (narrow, r"layer model\.layers\.0\.mlp\.down_proj has 48 inputs, but its .* data 40 ch"),
        (without(covariances, FIRST), f"no covariance for layer {FIRST} in data: calibrate the"),
        (calibrated(num_hidden_layers=1)[1], r"no covariance for layer model\.layers\.1\."),
        (CovarianceSet({}), "there is no covariance for layer"),
        (CovarianceSet({}, left_out=dict.fromkeys(covariances, "")), "cover none of the target"),
    ]
    for given, message in cases:
        with pytest.raises(CovarianceError, match=message):
            init_corda(model, given, config())


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_layer_left_out_of_calibration_gets_no_adapter(
    calibrated: Calibrated,
    logits: Logits,
    same_logits: Callable[..., bool],
    use_peft: bool,
) -> None:
    model, covariances = calibrated()
    rest = without(covariances, FIRST, left_out={FIRST: "never called during calibration"})
    adapted = init_corda(model, rest, config(), use_peft=use_peft)
    adapter = adapter_of(adapted)
    assert adapter.layers.keys() == covariances.keys() - {FIRST}
    assert adapter.record.base["target_modules"] == sorted(adapter.layers)
    assert type(adapted.get_submodule(f"base_model.model.{FIRST}" if use_peft else FIRST)) is (
        nn.Linear
    )
    assert same_logits(logits(adapted), calibrated()[0])


def test_fused_experts_are_left_out_with_a_warning(
    tiny_model: Make, logits: Logits, same_logits: Callable[..., bool]
) -> None:
    model = tiny_model("mixtral")
    with pytest.warns(LeftOutWarning, match="get no covariance and no adapter"):
        adapted = init_corda(copy.deepcopy(model), random_batches(), config(), use_peft=False)
    names = adapter_of(adapted).layers
    assert len(names) == 8
    assert all(".self_attn." in name for name in names)
    assert same_logits(logits(adapted), model)


@pytest.mark.parametrize(
    ("damping", "effect"),
    [
        (0.01, "a damping of 0.01 times the mean diagonal was added, which stands in for the dir"),
        (0.0, "without damping, directions that the text never touched are ordered by the weights"),
        (None, "without damping, directions that the text never touched are ordered by the weigh"),
    ],
)
def test_too_few_tokens_are_warned_of_with_what_damping_did(
    calibrated: Calibrated, damping: float | None, effect: str
) -> None:
    model, _ = calibrated()
    with pytest.warns(RankDeficientWarning) as caught:
        init_corda(model, random_batches(1, 2, 20), config(damping=damping), use_peft=False)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith("the covariances of 2 layer(s) come from fewer tokens than channels")
    assert "down_proj (40 tokens, 48 channels)" in text
    assert effect in text
    assert text.endswith("more samples or longer sequences improve it")


def test_layers_that_are_no_targets_are_not_warned_of(calibrated: Calibrated) -> None:
    model, _ = calibrated()
    found = calibrate(model, random_batches(1, 2, 20), progress=False)
    init_corda(model, found, config(targets=["q_proj"]))  # a warning is an error here


def test_as_many_tokens_as_channels_bring_no_warning(calibrated: Calibrated) -> None:
    model, _ = calibrated()
    init_corda(model, random_batches(1, 3, 16), config())  # a warning is an error here


@pytest.mark.parametrize("index", [0, 3])
def test_a_batch_that_is_not_finite_is_named(calibrated: Calibrated, index: int) -> None:
    model, _ = calibrated()
    model.model.embed_tokens.weight.data[2] = float("nan")
    batches = random_batches()
    batches[index][0, 0] = 2
    with pytest.raises(NonFiniteActivationError, match=f"in batch {index} ") as caught:
        init_corda(model, batches, config())
    assert (caught.value.layer, caught.value.batch) == (FIRST, index)
    assert caught.value.tokens == (64 * index, 64 * (index + 1))
    assert f"tokens {64 * index} to {64 * (index + 1)}" in str(caught.value)


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_an_adapted_model_gets_no_second_adapter(
    calibrated: Calibrated, adapt: Make, use_peft: bool
) -> None:
    adapted = adapt(calibrated(), use_peft=use_peft)
    with pytest.raises(CordaError):
        init_corda(adapted, random_batches(), config(), use_peft=use_peft)


def test_a_covariance_with_nan_is_refused(calibrated: Calibrated) -> None:
    model, covariances = calibrated()
    good = covariances[FIRST]
    matrix = good.matrix.clone()
    matrix[0, 0] = float("nan")
    poisoned = Covariance(matrix, good.tokens, good.calls, good.absmax, good.outlier_count, 6.0)
    given = CovarianceSet(dict(covariances) | {FIRST: poisoned})
    with pytest.raises(DecompositionError, match="holds NaN or Inf"):
        init_corda(model, given, config())
