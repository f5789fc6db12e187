from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from corda_kernels import CordaConfig, export_lora, load_for_training, merge, save_adapter
from corda_kernels.adapter import (
    LayerAdapter,
    LoraExport,
    adapter_of,
    live_adapter,
    residual_marker,
    subtract_initial,
)
from corda_kernels.errors import AdapterError, CordaWarning, OutputError, RankError
from corda_kernels.init import corda_adapter
from corda_kernels.linears import linear_weight

Calibrated = Callable[..., tuple[nn.Module, Any]]
Make = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]

BUDGET = {"budget": "r=4", "max_rank": 6}
# Architecture, options of CordaConfig, with PEFT or without.
CASES = [
    ("llama", {}, True),
    ("llama", {"mode": "kpm", "hold": 8}, False),
    ("llama", BUDGET | {"hold": 3}, True),
    ("llama", BUDGET, False),
    ("llama", {"residual": "weight"}, True),
    ("llama", {"residual": "weight"} | BUDGET, False),
    ("llama", {"targets": ["0.self_attn.v_proj", "down_proj"]}, True),
    ("gpt2", {"hold": 8}, True),
    ("gpt2", {"residual": "weight"}, False),
    ("qwen2", {}, True),
    ("gemma2", {"residual": "weight"}, True),
    ("mixtral", {"hold": 8}, True),
]
every_case = pytest.mark.parametrize(("architecture", "options", "use_peft"), CASES)
pytestmark = [
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning"),
    # PEFT looks for the base to see whether its embeddings have another size.
    pytest.mark.filterwarnings("ignore:Could not find a config file in residual of:UserWarning"),
]


def written(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer in a folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    start, end = "base_model.model.", ".lora_A.weight"
    names = [key.removeprefix(start).removesuffix(end) for key in tensors if key.endswith(end)]
    return {
        name: (tensors[f"{start}{name}{end}"], tensors[f"{start}{name}.lora_B.weight"])
        for name in names
    }


def described(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def change_of(layer: LayerAdapter) -> Tensor:
    """ΔW in float64."""
    change = layer.scaling * layer.B.double() @ layer.A.double()
    if layer.initial is not None:
        change -= layer.scaling * layer.initial.B.double() @ layer.initial.A.double()
    return change


@every_case
def test_an_export_is_a_plain_lora_of_one_rank_for_the_untouched_base(
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
    found = export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert export_lora(model, tmp_path / "same") == found
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    assert {file.name for file in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }

    layers = adapter_of(model).layers
    rank = max(layer.change().rank for layer in layers.values())
    assert found == LoraExport(rank, 0.0, None)
    factors, config = written(tmp_path / "lora"), described(tmp_path / "lora")
    scaling = config["lora_alpha"] / config["r"]
    assert factors.keys() == layers.keys()
    for name, layer in layers.items():
        A, B = factors[name]
        assert (A.shape[0], B.shape[1]) == (rank, rank)
        torch.testing.assert_close(
            scaling * B.double() @ A.double(), change_of(layer), atol=1e-5, rtol=1e-5
        )
    assert (config["r"], config["inference_mode"]) == (rank, True)
    assert config["alpha_pattern"] == config["rank_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == calibrated(architecture)[0].name_or_path

    stock = PeftModel.from_pretrained(calibrated(architecture)[0], tmp_path / "lora")
    assert same_logits(logits(stock), model)
    assert not torch.allclose(logits(stock), logits(calibrated(architecture)[0]), atol=0.1)


@pytest.mark.parametrize("hold", [1, 8, 3])
def test_an_adapter_of_one_rank_is_copied(
    calibrated: Calibrated, adapt: Make, train: Make, logits: Logits, tmp_path: Path, hold: float
) -> None:
    model = train(adapt(calibrated(), hold=hold))
    save_adapter(model, tmp_path / "adapter")
    for rank in (None, 8, 100):
        assert export_lora(tmp_path / "adapter", tmp_path / "lora", rank) == LoraExport(8)
        weights = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
        assert weights == (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
        config = described(tmp_path / "lora")
        assert config == described(tmp_path / "adapter")
        assert config["lora_alpha"] == pytest.approx(8 / hold, rel=1e-15)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora")
    assert torch.equal(logits(stock), logits(model))


def test_whole_alphas_are_written_as_whole_numbers(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    export_lora(adapt(calibrated(), hold=8), tmp_path)
    assert '"lora_alpha": 1,' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("hold", [1, 8])
def test_an_adapter_of_a_budget_is_padded_and_its_scaling_folded_into_b(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path, hold: float
) -> None:
    model = train(adapt(calibrated(), hold=hold, **BUDGET))
    widest = max(layer.trained.rank for layer in adapter_of(model).layers.values())
    assert export_lora(model, tmp_path).rank == widest
    config = described(tmp_path)
    assert config["lora_alpha"] == config["r"] == widest
    ranks = set()
    for name, layer in adapter_of(model).layers.items():
        A, B = written(tmp_path)[name]
        rank = layer.trained.rank
        ranks.add(rank)
        assert torch.equal(A[:rank], layer.A)
        torch.testing.assert_close(B[:, :rank], layer.B / hold)
        assert not bool(A[rank:].any() | B[:, rank:].any())
    assert len(ranks) > 1


@pytest.mark.parametrize(
    "options",
    [{}, {"hold": 8}, BUDGET | {"hold": 3}, {"residual": "weight"}],
    ids=["plain", "hold", "budget", "published"],
)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_smaller_rank_is_the_best_of_that_rank_with_the_true_error(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    tmp_path: Path,
    options: dict[str, Any],
    rank: int,
) -> None:
    model = train(adapt(calibrated(), **options))
    found = export_lora(model, tmp_path, rank)
    config = described(tmp_path)
    assert config["lora_alpha"] == config["r"] == found.rank == rank
    errors = {}
    for name, layer in adapter_of(model).layers.items():
        change = change_of(layer)
        S = torch.linalg.svdvals(change)
        A, B = (factor.double() for factor in written(tmp_path)[name])
        assert (A.shape[0], B.shape[1]) == (rank, rank)
        errors[name] = float(S[rank:].norm() / S.norm())
        assert float((change - B @ A).norm() / S.norm()) == pytest.approx(errors[name], abs=1e-6)
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-5, atol=1e-5)
        kept = min(rank, layer.change().rank)
        torch.testing.assert_close(A.norm(dim=1)[:kept].square(), S[:kept], rtol=1e-4, atol=1e-5)
    assert found.layer == max(errors, key=errors.__getitem__)
    assert found.error == pytest.approx(max(errors.values()), abs=1e-6)
    assert found.error > 0.01


def test_a_change_of_zero_is_cut_off_without_error(
    calibrated: Calibrated, adapt: Make, logits: Logits, tmp_path: Path
) -> None:
    found = export_lora(adapt(calibrated()), tmp_path, 2)
    assert (found.rank, found.error) == (2, 0.0)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path)
    assert torch.equal(logits(stock), logits(calibrated()[0]))


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_a_rank_that_is_none_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, rank: Any
) -> None:
    model = adapt(calibrated())
    with pytest.raises(RankError, match="must be a whole number of at least 1, got"):
        export_lora(model, tmp_path / "lora", rank)
    assert not (tmp_path / "lora").exists()


def test_a_rank_that_servers_do_not_load_is_warned_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(600, 600, bias=False))
    get_peft_model(model, LoraConfig(r=513, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.warns(
        CordaWarning, match="the LoRA has rank 513, and vLLM serves 512 at most"
    ) as w:
        export_lora(tmp_path, tmp_path / "lora")
    assert w[0].filename == __file__
    assert export_lora(tmp_path, tmp_path / "served", 512).rank == 512


def stock_lora(calibrated: Calibrated, train: Make, **options: Any) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM", **({"target_modules": ["q_proj", "down_proj"]} | options)
    )
    return train(get_peft_model(calibrated()[0], config))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"r": 4, "lora_alpha": 5, "use_rslora": True},
        {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ],
    ids=["plain", "gaussian", "rslora", "patterns", "whole modules", "bias"],
)
@pytest.mark.parametrize("from_model", [True, False])
@pytest.mark.filterwarnings("ignore:.*bias='all'.*:UserWarning")
def test_a_lora_of_peft_is_exported_too(
    calibrated: Calibrated,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
    from_model: bool,
) -> None:
    model = stock_lora(calibrated, train, **options)
    model.save_pretrained(tmp_path / "adapter")
    found = export_lora(model if from_model else tmp_path / "adapter", tmp_path / "lora")
    config = described(tmp_path / "lora")
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert {A.shape[0] for A, _ in written(tmp_path / "lora").values()} == {found.rank}
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_what_is_saved_beside_the_factors_is_kept(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path
) -> None:
    model = train(adapt(calibrated(), modules_to_save=["lm_head"], **BUDGET))
    save_adapter(model, tmp_path / "adapter")
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    others = {key for key in expected if "lora_" not in key}
    assert others == {"base_model.model.lm_head.weight"}
    for rank in (None, 2):
        export_lora(tmp_path / "adapter", tmp_path / f"lora{rank}", rank)
        found = load_file(tmp_path / f"lora{rank}" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in others)
        assert described(tmp_path / f"lora{rank}")["modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize("options", [{}, {"hold": 8} | BUDGET])
@pytest.mark.parametrize("from_model", [True, False])
def test_dora_is_copied_and_padded_but_not_cut_off(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
    from_model: bool,
) -> None:
    model = train(adapt(calibrated(), use_dora=True, **options))
    save_adapter(model, tmp_path / "adapter")
    source = model if from_model else tmp_path / "adapter"
    export_lora(source, tmp_path / "lora")
    assert described(tmp_path / "lora")["use_dora"] is True
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match=r"with DoRA .* cannot be cut off alone: export it at"):
        export_lora(source, tmp_path / "cut", 2)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "embed_tokens"]}, {"lora_bias": True}],
    ids=["embeddings", "bias of B"],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:.*have invalid shape")
def test_a_lora_with_other_parts_can_only_be_copied(
    calibrated: Calibrated, train: Make, logits: Logits, tmp_path: Path, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        model = stock_lora(calibrated, lambda model: model, r=4, **options)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "copied", save_embedding_layers=False)
    export_lora(tmp_path / "copied", tmp_path / "lora")
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "lora")
    assert torch.equal(logits(stock), logits(model.eval()))
    with pytest.raises(AdapterError, match=r"more than the weights of linear layers \(base_model"):
        export_lora(tmp_path / "copied", tmp_path / "cut", 2)
    scaled = stock_lora(calibrated, train, r=4, use_rslora=True, **options)
    scaled.save_pretrained(tmp_path / "scaled", save_embedding_layers=False)
    with pytest.raises(AdapterError, match="can only be copied: export it at its own rank"):
        export_lora(tmp_path / "scaled", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: m, "carries no adapter: attach one with init_corda or load_for_training"),
        (
            lambda m: get_peft_model(
                m, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
            ),
            "init_lora_weights='pissa', which does not start at B A = 0",
        ),
    ],
    ids=["plain", "pissa"],
)
def test_a_model_without_a_lora_on_the_untouched_base_is_refused(
    calibrated: Calibrated, tmp_path: Path, wrap: Make, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        export_lora(wrap(calibrated()[0]), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_export_of_the_published_form_does_not_cancel(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated(), residual="weight")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.001)
    export_lora(model, tmp_path)
    config = described(tmp_path)
    assert config["lora_alpha"] == config["r"] == 8
    for name, layer in adapter_of(model).layers.items():
        A, B = written(tmp_path)[name]
        product = (B.bfloat16().float() @ A.bfloat16().float()).double()
        change = change_of(layer)
        assert float((product - change).norm()) < 0.01 * float(change.norm())


def test_the_export_of_a_nameless_base_names_none(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    for residual in (None, "weight"):
        model, covariances = calibrated()
        model.name_or_path = ""
        adapted = adapt((model, covariances), residual=residual, use_peft=False)
        save_adapter(adapted, tmp_path / str(residual))
        for source in (adapted, tmp_path / str(residual)):
            export_lora(source, tmp_path / "lora")
            assert described(tmp_path / "lora")["base_model_name_or_path"] is None


def test_the_card_says_what_base_and_rank_and_how_to_load_it(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path
) -> None:
    model = train(adapt(calibrated()))
    export_lora(model, tmp_path / "whole")
    card = (tmp_path / "whole" / "README.md").read_text()
    name = calibrated()[0].name_or_path
    for expected in (
        f"base_model: {json.dumps(name)}\n",
        f"Base model: `{name}`.",
        "A plain LoRA of rank 8 for the untouched base. Nothing was cut off.",
        "PeftModel.from_pretrained(base, FOLDER)",
        "--max-lora-rank 8`.",
    ):
        assert expected in card
    found = export_lora(model, tmp_path / "cut", 3)
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"Cut off from rank 8, with an error of {found.error:.2%} at most in any layer." in card
    assert "A plain LoRA of rank 3" in card


@every_case
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


@pytest.mark.parametrize("residual", [None, "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
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
        assert (found != (base + layer.trained.product()).bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def test_an_output_that_is_a_file_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file already"):
        export_lora(adapt(calibrated()), tmp_path / "file")


@pytest.mark.parametrize("residual", [None, "weight"])
def test_an_export_does_not_damage_an_adapter(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, residual: str | None
) -> None:
    save_adapter(adapt(calibrated(), residual=residual), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="holds an adapter"):
        export_lora(tmp_path, tmp_path)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    load_for_training(calibrated()[0], tmp_path)
    if residual is not None:  # which would be taken for those of the export
        (tmp_path / "corda.json").unlink()
        with pytest.raises(OutputError, match="holds an adapter"):
            export_lora(tmp_path, tmp_path)


def test_the_change_is_exact_where_the_trained_factors_were_cast(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path
) -> None:
    model = train(adapt(calibrated(), residual="weight")).to(torch.bfloat16)
    initial = model.corda_initial
    export_lora(model, tmp_path)
    for name, (A, B) in written(tmp_path).items():
        layer = model.get_base_model().get_submodule(name)
        trained = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        taken = initial[name].B.double() @ initial[name].A.double()
        expected = trained - taken
        assert (B.double() @ A.double() - expected).norm() < 1e-5 * expected.norm(), name


def test_an_adapter_of_a_residual_that_stock_peft_loaded_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    adapt(calibrated(), residual="weight").save_pretrained(tmp_path / "checkpoint")
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path / "checkpoint")
    with pytest.raises(AdapterError, match="fits the residual of its base"):
        export_lora(stock, tmp_path / "out")


def test_dora_hides_no_foreign_start(calibrated: Calibrated, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, use_dora=True, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]
    )
    with pytest.raises(AdapterError, match="init_lora_weights='pissa'"):
        export_lora(get_peft_model(calibrated()[0], config), tmp_path)


def test_an_export_does_not_replace_its_source(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    adapt(calibrated()).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="choose another folder"):
        export_lora(tmp_path, tmp_path, rank=2)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_initial_factors_that_another_adapter_left_behind_are_named(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    save_adapter(adapt(calibrated(), residual="weight", rank=8), tmp_path)
    (tmp_path / "corda.json").unlink()
    adapt(calibrated(), rank=4).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"corda_initial\.safetensors is left over"):
        export_lora(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("rank", [None, 2])
def test_a_training_that_diverged_is_not_exported(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, rank: int | None
) -> None:
    model = adapt(calibrated())
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_base_model().get_submodule(name).lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match=rf"layer {name} .* not finite: .*diverged"):
        export_lora(model, tmp_path / "out", rank=rank)


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


def test_patterns_of_a_model_are_expressions(
    calibrated: Calibrated, train: Make, logits: Logits, tmp_path: Path
) -> None:
    pattern = {r"layers\.[1-9]\..*": 2}
    model = stock_lora(calibrated, train, rank_pattern=pattern, alpha_pattern=pattern)
    export_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_the_record_is_of_the_adapter_default_alone(calibrated: Calibrated, adapt: Make) -> None:
    model = adapt(calibrated())
    assert live_adapter(model).record is not None
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert live_adapter(model).record is None
