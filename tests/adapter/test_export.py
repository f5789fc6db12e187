"""The plain LoRA that an adapter is exported as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import BUDGET, described, written
from kinds import Calibrated, Logits, Make
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from corda_kernels import export_lora, load_for_training, save_adapter
from corda_kernels.adapter import LayerAdapter, adapter_of, live_adapter
from corda_kernels.adapter.export import LoraExport
from corda_kernels.errors import AdapterError, CordaWarning, OutputError, RankError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning"),
    # PEFT looks for the base to see whether its embeddings have another size.
    pytest.mark.filterwarnings("ignore:Could not find a config file in residual of:UserWarning"),
]

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


def change_of(layer: LayerAdapter) -> Tensor:
    """ΔW in float64."""
    change = layer.scaling * layer.B.double() @ layer.A.double()
    if layer.initial is not None:
        change -= layer.scaling * layer.initial.B.double() @ layer.initial.A.double()
    return change


@pytest.mark.parametrize(("architecture", "options", "use_peft"), CASES)
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
    widest = max(layer.rank for layer in adapter_of(model).layers.values())
    assert export_lora(model, tmp_path).rank == widest
    config = described(tmp_path)
    assert config["lora_alpha"] == config["r"] == widest
    ranks = set()
    for name, layer in adapter_of(model).layers.items():
        A, B = written(tmp_path)[name]
        rank = layer.rank
        ranks.add(rank)
        assert torch.equal(A[:rank], layer.A)
        torch.testing.assert_close(B[:, :rank], layer.B / hold)
        assert not bool(A[rank:].any() | B[:, rank:].any())
    assert len(ranks) > 1


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 3),
        ({"hold": 8}, 1),
        (BUDGET | {"hold": 3}, 5),
        ({"residual": "weight"}, 3),
        ({"residual": "weight"}, 5),
    ],
)
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


@pytest.mark.parametrize(("options", "from_model"), [({}, True), ({"hold": 8} | BUDGET, False)])
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
    with pytest.raises(AdapterError, match=r"DoRA .* cannot be truncated: export it at"):
        export_lora(source, tmp_path / "cut", 2)
    assert not (tmp_path / "cut").exists()


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


def test_an_export_does_not_replace_its_source(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    adapt(calibrated()).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="choose another folder"):
        export_lora(tmp_path, tmp_path, rank=2)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


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


def test_the_record_is_of_the_adapter_default_alone(calibrated: Calibrated, adapt: Make) -> None:
    model = adapt(calibrated())
    assert live_adapter(model).record is not None
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert live_adapter(model).record is None
