"""An adapter's folder: what is written comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    BUDGET,
    CONFIG,
    FILES,
    FIRST,
    INITIAL,
    NO_BASE,
    PUBLISHED,
    WEIGHTS,
    described,
    factors,
    files_in,
    same,
)
from kinds import Calibrated, Logits, Make
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from corda_kernels import CordaConfig, export_lora, load_for_training, save_adapter
from corda_kernels.adapter import adapter_of, attach, read_adapter, write_adapter
from corda_kernels.adapter.folder import check_adapter_folder
from corda_kernels.errors import AdapterError, OutputError
from corda_kernels.init import corda_adapter

pytestmark = pytest.mark.filterwarnings(NO_BASE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options", "trained", "saves_peft", "loads_peft"),
    [
        ("llama", {}, True, True, True),
        ("llama", {}, True, False, False),
        ("llama", {"hold": 8}, False, True, True),
        ("llama", {"hold": 8}, True, True, False),
        ("llama", {"hold": 3, "rank": 5}, True, False, True),
        ("llama", BUDGET, True, True, True),
        ("llama", BUDGET | {"hold": 8}, True, False, True),
        ("llama", BUDGET | {"hold": 8}, True, True, False),
        ("llama", PUBLISHED, True, True, True),
        ("llama", PUBLISHED, True, False, True),
        ("llama", PUBLISHED, True, False, False),
        ("llama", PUBLISHED | BUDGET, True, True, False),
        ("gpt2", {"hold": 8}, True, True, False),
        ("gpt2", PUBLISHED, True, False, True),
        ("mixtral", {}, True, True, True),
    ],
)
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_a_folder_brings_every_bit_back(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
    trained: bool,
    saves_peft: bool,
    loads_peft: bool,
) -> None:
    model = adapt(calibrated(architecture), use_peft=saves_peft, **options)
    if "budget" in options:
        assert len({layer.rank for layer in adapter_of(model).layers.values()}) > 1
    if trained:
        train(model)
    save_adapter(model, tmp_path)
    loaded = load_for_training(calibrated(architecture)[0], tmp_path, use_peft=loads_peft)
    assert isinstance(loaded, PeftModel) == loads_peft
    assert same(factors(loaded), factors(model))
    assert adapter_of(loaded).record == adapter_of(model).record
    for name, layer in adapter_of(model).layers.items():
        assert adapter_of(loaded).layers[name].scaling == pytest.approx(layer.scaling, rel=1e-15)
    if saves_peft == loads_peft:
        assert torch.equal(logits(loaded), logits(model))
    else:  # PEFT scales what B gives before it adds it
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(adapter_of(model).layers)
    save_adapter(loaded, tmp_path / "again")
    expected = FILES | ({INITIAL} if options.get("residual") else set())
    assert files_in(tmp_path / "again") == expected
    for file in expected:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("options", [{}, {"hold": 8} | BUDGET, PUBLISHED])
def test_plain_data_is_written_as_a_model_is(
    calibrated: Calibrated, adapt: Make, logits: Logits, tmp_path: Path, options: dict[str, Any]
) -> None:
    base, covariances = calibrated()
    config = CordaConfig("ipm", **({"rank": 4, "progress": False} | options))
    adapter = corda_adapter(base, covariances, config)
    write_adapter(adapter, tmp_path / "data")
    model = attach(base, adapter)
    save_adapter(model, tmp_path / "model")
    assert files_in(tmp_path / "data") == files_in(tmp_path / "model")
    for file in files_in(tmp_path / "data"):
        written = (tmp_path / "data" / file).read_bytes()
        assert written == (tmp_path / "model" / file).read_bytes(), file
    found = read_adapter(tmp_path / "data")
    assert found.record == adapter.record
    again = attach(calibrated()[0], found)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", [{}, {"hold": 8} | BUDGET, PUBLISHED])
def test_a_loaded_adapter_trains_on(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    save_adapter(train(adapt(calibrated(), **options)), tmp_path)
    model = load_for_training(calibrated()[0], tmp_path)
    before, start = factors(model), logits(model)
    before = {name: value.clone() for name, value in before.items()}
    train(model)
    assert not torch.allclose(logits(model), start, atol=0.1)
    after = factors(model)
    moved = {name for name in before if not after[name].equal(before[name])}
    assert moved == {name for name in before if name.endswith((".A", ".B"))}


@pytest.mark.parametrize(
    ("architecture", "targets", "options"),
    [
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", {}),
        ("gpt2", "c_attn c_proj c_fc", {"lora_dropout": 0.1}),
    ],
)
def test_the_folder_is_laid_out_as_stock_peft_does(
    calibrated: Calibrated,
    adapt: Make,
    tmp_path: Path,
    architecture: str,
    targets: str,
    options: dict[str, Any],
) -> None:
    ours, theirs, stock = tmp_path / "ours", tmp_path / "theirs", tmp_path / "stock"
    model = adapt(calibrated(architecture), hold=8, **options)
    assert type(model).__module__.startswith("peft.")
    save_adapter(model, ours)
    model.save_pretrained(theirs)
    config = LoraConfig(
        r=8,
        lora_alpha=1,
        target_modules=targets.split(),
        task_type="CAUSAL_LM",
        fan_in_fan_out=architecture == "gpt2",
        **options,
    )
    get_peft_model(calibrated(architecture)[0], config).save_pretrained(stock)

    mine, plain = load_file(ours / WEIGHTS), load_file(stock / WEIGHTS)
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
        k: (v.shape, v.dtype) for k, v in plain.items()
    }
    assert same(load_file(theirs / WEIGHTS), mine)
    assert described(ours) == described(theirs) == described(stock)


@pytest.mark.parametrize("options", [{}, {"hold": 8} | BUDGET, {"use_dora": True}])
def test_stock_peft_runs_the_folder_on_the_untouched_base(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    model = train(adapt(calibrated(), **options))
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path)
    assert torch.equal(logits(stock), logits(model))
    assert not torch.allclose(logits(stock), logits(calibrated()[0]), atol=0.1)


@pytest.mark.filterwarnings("ignore:.*corda_config. is not specified:UserWarning")
def test_stock_peft_refuses_the_published_form(calibrated: Calibrated, published: Path) -> None:
    assert described(published)["init_lora_weights"] == "corda"
    assert described(published)["base_model_name_or_path"].startswith("residual of ")
    with pytest.raises(ValueError, match="corda"):
        PeftModel.from_pretrained(calibrated()[0], published)


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_plain_adapter_over_a_published_one_leaves_no_initial_factors(
    calibrated: Calibrated, adapt: Make, logits: Logits, published: Path, use_peft: bool
) -> None:
    assert files_in(published) == FILES | {INITIAL}
    model = adapt(calibrated(), use_peft=use_peft)
    save_adapter(model, published)
    assert files_in(published) == FILES
    assert read_adapter(published).initial is None
    loaded = load_for_training(calibrated()[0], published, use_peft=use_peft)
    assert torch.equal(logits(loaded), logits(model))
    stock = PeftModel.from_pretrained(calibrated()[0], published)
    torch.testing.assert_close(logits(stock), logits(model))


def test_saving_again_replaces_the_adapter(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated())
    save_adapter(model, tmp_path)
    fresh = read_adapter(tmp_path).layers[FIRST].A
    save_adapter(train(model), tmp_path)
    assert not read_adapter(tmp_path).layers[FIRST].A.equal(fresh)
    assert files_in(tmp_path) == FILES


@pytest.mark.parametrize("residual", [None, "weight"])
def test_a_record_that_cannot_be_written_leaves_the_adapter_alone(
    folder: Path, published: Path, residual: str | None
) -> None:
    there = published if residual is None else folder
    before = {file: file.read_bytes() for file in there.rglob("*") if file.is_file()}
    adapter = read_adapter(folder if residual is None else published)
    adapter.record.calibration["data"] = "\udce9"
    adapter.layers[FIRST].A.zero_()
    with pytest.raises(UnicodeEncodeError):
        write_adapter(adapter, there)
    assert before == {file: file.read_bytes() for file in there.rglob("*") if file.is_file()}


def test_a_save_that_fails_halfway_leaves_the_published_adapter_alone(
    calibrated: Calibrated,
    adapt: Make,
    logits: Logits,
    published: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = logits(load_for_training(calibrated()[0], published))

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corda_kernels.adapter.folder.adapter_card", full)
    with pytest.raises(OutputError, match="No space left"):
        save_adapter(adapt(calibrated()), published)
    assert torch.equal(logits(load_for_training(calibrated()[0], published)), before)


def test_an_output_that_is_a_file_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file already"):
        save_adapter(adapt(calibrated()), tmp_path / "file")


def test_an_adapter_is_not_written_over_a_model(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated())
    calibrated()[0].save_pretrained(tmp_path)
    for use in (save_adapter, export_lora):
        with pytest.raises(OutputError, match="holds a model, which would be loaded with the"):
            use(model, tmp_path)
    with pytest.raises(OutputError, match="holds a model"):
        check_adapter_folder(tmp_path)
    assert not (tmp_path / CONFIG).exists()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_is_more_than_factors_is_saved_from_a_model_only(
    calibrated: Calibrated,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    base, covariances = calibrated()
    adapter = corda_adapter(
        base, covariances, CordaConfig("ipm", progress=False, rank=4, **options)
    )
    with pytest.raises(AdapterError, match=rf"{min(options)} is more than its factors: attach it"):
        write_adapter(adapter, tmp_path)
    assert not list(tmp_path.iterdir())
    model = train(attach(base, adapter))
    save_adapter(model, tmp_path)
    assert files_in(tmp_path) == FILES
    loaded = load_for_training(calibrated()[0], tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(AdapterError, match=r"more than the factors of linear layers \(base_model"):
        load_for_training(calibrated()[0], tmp_path, use_peft=False)


def test_whole_modules_come_back_and_train_on(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated(), modules_to_save=["lm_head", "embed_tokens"])
    before = calibrated()[0].lm_head.weight
    save_adapter(train(model), tmp_path)
    loaded = load_for_training(calibrated()[0], tmp_path)
    for name in ("lm_head", "model.embed_tokens"):
        wrapped = loaded.get_base_model().get_submodule(name)
        expected = model.get_base_model().get_submodule(name)
        weight = wrapped.modules_to_save["default"].weight
        assert torch.equal(weight, expected.modules_to_save["default"].weight)
        assert weight.requires_grad
    assert not torch.equal(loaded.get_base_model().lm_head.weight, before)


@pytest.mark.parametrize("residual", [None, "weight"])
def test_resized_embeddings_come_back(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    residual: str | None,
) -> None:
    base, covariances = calibrated()
    base.resize_token_embeddings(70)
    model = train(adapt((base, covariances), residual=residual))
    with torch.no_grad():
        base.get_input_embeddings().weight[64:] = 7.0
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        save_adapter(model, tmp_path)
    other, _ = calibrated()
    other.resize_token_embeddings(70)
    assert not bool((other.get_input_embeddings().weight[64:] == 7.0).all())
    loaded = load_for_training(other, tmp_path)
    assert bool((loaded.get_input_embeddings().weight[64:] == 7.0).all())
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda m: m,
            "carries no adapter of linear layers: attach one with init_corda or load_for_training",
        ),
        (
            lambda m: get_peft_model(m, LoraConfig(target_modules="all-linear")),
            "no record of how it was made: stock PEFT saves and loads it all the same",
        ),
    ],
    ids=["plain", "PeftModel"],
)
def test_a_model_without_our_adapter_is_not_saved(
    calibrated: Calibrated, tmp_path: Path, wrap: Make, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        save_adapter(wrap(calibrated()[0]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_record_of_an_adapter_is_not_that_of_the_next_one(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    """PEFT gives the next adapter the name of the first."""
    model = adapt(calibrated())
    save_adapter(copy.deepcopy(model), tmp_path / "copy")
    config = copy.deepcopy(model.peft_config["default"])
    model.delete_adapter("default")
    model.add_adapter("default", config)
    with pytest.raises(AdapterError, match="no record of how it was made"):
        save_adapter(model, tmp_path / "adapter")


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(AdapterError, match="path"):
        read_adapter(5)  # type: ignore[arg-type]


def test_the_folder_of_a_nameless_base_names_none(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    for residual, expected in ((None, None), ("weight", "residual of ")):
        model, covariances = calibrated()
        model.name_or_path = ""
        save_adapter(adapt((model, covariances), residual=residual), tmp_path)
        named = described(tmp_path)["base_model_name_or_path"]
        assert (named or None) == expected  # before 0.21, PEFT writes an empty name
        assert "base_model:" not in (tmp_path / "README.md").read_text()
