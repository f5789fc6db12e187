from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from corda_kernels import CordaConfig, export_lora, load_for_training, merge, save_adapter
from corda_kernels.adapter import (
    adapter_of,
    attach,
    check_adapter_folder,
    read_adapter,
    residual_marker,
    subtract_initial,
    write_adapter,
)
from corda_kernels.adapter.record import initial_checksum
from corda_kernels.errors import AdapterError, ModelError, OutputError
from corda_kernels.init import corda_adapter, init_corda
from corda_kernels.linears import linear_weight

Calibrated = Callable[..., tuple[nn.Module, Any]]
Make = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
INITIAL = "corda_initial.safetensors"
FIRST = "model.layers.0.self_attn.q_proj"
# PEFT looks for the base to see whether its embeddings have another size.
NO_BASE = "ignore:Could not find a config file in residual of:UserWarning"
pytestmark = pytest.mark.filterwarnings(NO_BASE)
FILES = {WEIGHTS, CONFIG, "corda.json", "README.md"}


@pytest.fixture
def folder(calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path) -> Path:
    """The folder of a trained adapter."""
    save_adapter(train(adapt(calibrated(), use_peft=False)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def published(calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path) -> Path:
    """The folder of a trained adapter with residual="weight"."""
    model = adapt(calibrated(), use_peft=False, residual="weight")
    save_adapter(train(model), tmp_path / "published")
    return tmp_path / "published"


def factors(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in adapter_of(model).layers.items():
        found |= {f"{name}.A": layer.A, f"{name}.B": layer.B}
        if layer.initial is not None:
            found |= {f"{name}.A0": layer.initial.A, f"{name}.B0": layer.initial.B}
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def described(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config | {"target_modules": sorted(config["target_modules"])}


BUDGET = {"budget": "r=4", "max_rank": 6}
PUBLISHED = {"residual": "weight"}


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
        assert len({layer.trained.rank for layer in adapter_of(model).layers.values()}) > 1
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
    ("architecture", "targets"),
    [
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("gpt2", "c_attn c_proj c_fc"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}])
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


@pytest.mark.parametrize("options", [{}, {"hold": 8} | BUDGET, {"use_dora": True}])
def test_a_checkpoint_that_peft_wrote_alone_loads(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    model = train(adapt(calibrated(), **options))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "corda.json").exists()
    loaded = load_for_training(calibrated()[0], tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.corda_record is None
    with pytest.raises(AdapterError, match="no record of how it was made: stock PEFT saves"):
        save_adapter(loaded, tmp_path)
    with pytest.raises(AdapterError, match=r"has no corda\.json: .*PEFT does not need it"):
        read_adapter(tmp_path)


def test_a_checkpoint_of_the_published_form_needs_the_initial_factors(
    calibrated: Calibrated, adapt: Make, train: Make, logits: Logits, tmp_path: Path
) -> None:
    fresh, checkpoint = tmp_path / "fresh", tmp_path / "checkpoint"
    model = adapt(calibrated(), residual="weight")
    save_adapter(model, fresh)
    train(model).save_pretrained(checkpoint)
    for use in (lambda f: load_for_training(calibrated()[0], f), lambda f: export_lora(f, f / "x")):
        with pytest.raises(AdapterError, match=rf"{checkpoint} lacks {INITIAL}, .*fresh adapter"):
            use(checkpoint)
    shutil.copy(fresh / INITIAL, checkpoint)
    assert torch.equal(logits(load_for_training(calibrated()[0], checkpoint)), logits(model))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda c: c("gpt2")[0], "has no linear layer model.* for: load the base it was made for"),
        (lambda c: c(intermediate_size=40)[0], "is 32 × 40, but the adapter is for 32 × 48"),
    ],
)
def test_a_checkpoint_of_the_published_form_leaves_another_base_alone(
    calibrated: Calibrated, published: Path, base: Callable[[Calibrated], nn.Module], message: str
) -> None:
    (published / "corda.json").unlink()
    other = base(calibrated)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_for_training(other, published)
    assert same(dict(other.state_dict()), dict(before))


@pytest.mark.parametrize("init_lora_weights", ["pissa", "olora"])
def test_another_start_of_peft_is_loaded_as_peft_does(
    calibrated: Calibrated, train: Make, logits: Logits, tmp_path: Path, init_lora_weights: str
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init_lora_weights)
    model = train(get_peft_model(calibrated()[0], config))
    model.save_pretrained(tmp_path)
    loaded = load_for_training(calibrated()[0], tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(AdapterError, match=f"'{init_lora_weights}', which does not start at B A"):
        export_lora(tmp_path, tmp_path / "lora")


def edit(folder: Path, change: Callable[[Any], object], file: str = "corda.json") -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def key(factor: str) -> str:
    return f"base_model.model.{FIRST}.lora_{factor}.weight"


RECORD_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "record cut": (lambda f: truncate(f / "corda.json"), "corda.json is not JSON .*copy it again"),
    "record empty": (lambda f: (f / "corda.json").write_text(""), "corda.json is not JSON"),
    "record binary": (lambda f: (f / "corda.json").write_bytes(b"\xff"), "corda.json is not JSON"),
    "record a list": (lambda f: (f / "corda.json").write_text("[]"), "corda.json was altered: it"),
    "field gone": (lambda f: edit(f, lambda v: v.pop("layers")), "field 'layers' is missing"),
    "field added": (lambda f: edit(f, lambda v: v.update(x=1)), "field 'x' is missing or unknown"),
    "later format": (lambda f: edit(f, lambda v: v.update(format="2")), "has format '2'"),
    "another rank": (
        lambda f: edit(f, lambda v: v["layers"][FIRST].update(rank=5)),
        f"lacks factors of 5 components for layer {FIRST}: its files belong to different adapters",
    ),
    "layer without fields": (
        lambda f: edit(f, lambda v: v["layers"].update({FIRST: {}})),
        f"field 'rank' is missing or unknown in {FIRST}",
    ),
    "base without fields": (lambda f: edit(f, lambda v: v["base"].clear()), "unknown in base"),
}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such adapter folder"),
    "no trained": (
        lambda f: (f / WEIGHTS).unlink(),
        f"{WEIGHTS} is missing: it holds the trained factors; copy it from where it was made",
    ),
    "trained pickled": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        r"adapter_model\.bin is not read here: load the folder with PeftModel\.from_pretrained",
    ),
    "trained cut": (
        lambda f: truncate(f / WEIGHTS),
        f"{WEIGHTS} is truncated or not a safetensors file .*copy it again",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} is missing: copy it from where"),
    "config cut": (lambda f: truncate(f / CONFIG), f"{CONFIG} is not JSON .*copy it again"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG} was altered: it holds"),
    "no lora": (
        lambda f: edit(f, lambda v: v.update(peft_type="IA3"), CONFIG),
        "holds no LoRA, but 'IA3'",
    ),
    "config without rank": (
        lambda f: edit(f, lambda v: v.pop("r"), CONFIG),
        f"{CONFIG} was altered: r is None",
    ),
    "config of no alpha": (
        lambda f: edit(f, lambda v: v.update(lora_alpha=0), CONFIG),
        f"{CONFIG} was altered: lora_alpha is 0",
    ),
    "config of another rank": (
        lambda f: edit(f, lambda v: v.update(r=16), CONFIG),
        f"has rank 8, but {CONFIG} says 16: its files belong to different adapters",
    ),
    "layer without A": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(key("A"))),
        f"lacks a factor of layer {FIRST}, or its A and B do not fit",
    ),
    "layer of two ranks": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({key("A"): torch.ones(5, 32)})),
        f"lacks a factor of layer {FIRST}, or its A and B do not fit",
    ),
    "no layers": (
        lambda f: save_file({}, f / WEIGHTS),
        f"{WEIGHTS} holds no factors of a LoRA's linear layers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(calibrated: Calibrated, folder: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    break_it(folder)
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match=message):
            load_for_training(calibrated()[0], folder, use_peft=use_peft)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)
    with pytest.raises(AdapterError, match=message):
        export_lora(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
def test_a_damaged_record_is_refused_where_it_is_read(
    calibrated: Calibrated, folder: Path, damage: str
) -> None:
    break_it, message = RECORD_DAMAGE[damage]
    break_it(folder)
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match=message):
            load_for_training(calibrated()[0], folder, use_peft=use_peft)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)
    export_lora(folder, folder.parent / "out")


def test_a_layer_that_is_gone_is_noticed_by_the_record(
    calibrated: Calibrated, folder: Path
) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: [t.pop(key(factor)) for factor in "AB"])
    with pytest.raises(AdapterError, match=f"lacks factors of 4 components for layer {FIRST}: its"):
        load_for_training(calibrated()[0], folder)


INITIAL_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (
        lambda f: (f / INITIAL).unlink(),
        f"lacks {INITIAL}, the part of the base that its adapter has taken over: copy it",
    ),
    "cut": (
        lambda f: truncate(f / INITIAL),
        f"{INITIAL} is truncated or not a safetensors file .*copy it again",
    ),
    "layer without B": (
        lambda f: edit_tensors(f / INITIAL, lambda t: t.pop(key("B"))),
        f"lacks a factor of layer {FIRST}",
    ),
    "layer gone": (
        lambda f: edit_tensors(f / INITIAL, lambda t: [t.pop(key(factor)) for factor in "AB"]),
        f"{INITIAL} and {WEIGHTS} differ in layer {FIRST}: they belong to different adapters; copy",
    ),
    "another shape": (
        lambda f: edit_tensors(f / INITIAL, lambda t: t.update({key("A"): torch.ones(4, 5)})),
        f"{INITIAL} and {WEIGHTS} differ in layer {FIRST}",
    ),
}


@pytest.mark.parametrize("damage", INITIAL_DAMAGE)
def test_damaged_initial_factors_are_refused_and_the_base_left_alone(
    calibrated: Calibrated, published: Path, damage: str
) -> None:
    break_it, message = INITIAL_DAMAGE[damage]
    break_it(published)
    base, _ = calibrated()
    before = copy.deepcopy(base.state_dict())
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match=message):
            load_for_training(base, published, use_peft=use_peft)
    with pytest.raises(AdapterError, match=message):
        export_lora(published, published.parent / "out")
    assert not (published.parent / "out").exists()
    assert same(dict(base.state_dict()), dict(before))


def test_initial_factors_beside_another_adapters_record_are_refused(
    calibrated: Calibrated, folder: Path, published: Path
) -> None:
    shutil.copy(folder / "corda.json", published)
    with pytest.raises(AdapterError, match=r"corda\.json belongs to another adapter: copy it"):
        load_for_training(calibrated()[0], published)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("trained cut", f"{WEIGHTS} is truncated or not a safetensors file"),
        ("no trained", "PEFT cannot load .*: "),
        ("config of another rank", "PEFT cannot load .*: "),
        ("no config", f"{CONFIG} is missing: copy it from where"),
    ],
)
def test_a_damaged_checkpoint_without_record_is_refused(
    calibrated: Calibrated, folder: Path, damage: str, message: str
) -> None:
    (folder / "corda.json").unlink()
    DAMAGE[damage][0](folder)
    with pytest.raises(AdapterError, match=message):
        load_for_training(calibrated()[0], folder)


def test_a_pickled_checkpoint_is_read_by_peft_only(
    calibrated: Calibrated, adapt: Make, train: Make, logits: Logits, tmp_path: Path
) -> None:
    model = train(adapt(calibrated()))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(logits(load_for_training(calibrated()[0], tmp_path)), logits(model))
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is not read here"):
        export_lora(tmp_path, tmp_path / "lora")


def perturbed(calibrated: Calibrated) -> nn.Module:
    model, _ = calibrated()
    for parameter in model.parameters():
        parameter.data *= 1.02
    return model


@pytest.mark.parametrize("residual", [None, "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize(
    ("base", "message"),
    [
        (perturbed, r"weights differ from that one's by 2\.0%: load the base that"),
        (lambda c: c(initializer_range=0.11)[0], "weights differ from that one's by"),
        (lambda c: c(intermediate_size=40)[0], "is 40 × 32, but the adapter is for 48 × 32: load"),
        (lambda c: c(num_hidden_layers=1)[0], r"has no linear layer model\.layers\.1\."),
        (lambda c: c("gpt2")[0], r"has no linear layer model\.layers\.0\..*without another adapt"),
    ],
    ids=["fine-tuned", "other weights", "other widths", "fewer layers", "other architecture"],
)
def test_another_base_is_refused_and_left_alone(
    calibrated: Calibrated,
    folder: Path,
    published: Path,
    base: Callable[[Calibrated], nn.Module],
    message: str,
    use_peft: bool,
    residual: str | None,
) -> None:
    other = base(calibrated)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_for_training(other, folder if residual is None else published, use_peft=use_peft)
    assert same(dict(other.state_dict()), dict(before))


@pytest.mark.parametrize("residual", [None, "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_a_narrow_dtype_is_accepted(
    calibrated: Calibrated,
    adapt: Make,
    logits: Logits,
    tmp_path: Path,
    dtype: torch.dtype,
    use_peft: bool,
    residual: str | None,
) -> None:
    save_adapter(adapt(calibrated(), residual=residual), tmp_path)
    base, _ = calibrated()
    model = load_for_training(base.to(dtype), tmp_path, use_peft=use_peft)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found, expected = logits(model), logits(calibrated()[0])
    assert found.dtype == dtype
    if residual is None:
        assert torch.equal(found, logits(calibrated()[0].to(dtype)))
    # Three times the 1.4 epsilons measured.
    assert (found - expected).norm() < 4.2 * torch.finfo(dtype).eps * expected.norm()
    save_adapter(model, tmp_path / "again")


@pytest.mark.parametrize("residual", [None, "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
def test_a_base_in_float64_is_accepted(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, use_peft: bool, residual: str | None
) -> None:
    model, covariances = calibrated()
    model = adapt((model.double(), covariances), residual=residual, use_peft=use_peft)
    save_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    loaded = load_for_training(calibrated()[0].double(), tmp_path, use_peft=use_peft)
    expected = factors(model)
    assert same({n: f.float() for n, f in factors(loaded).items()}, expected)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: m, "carries no adapter: attach one with init_corda or load_for_training"),
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


def test_a_second_adapter_on_top_is_refused(
    calibrated: Calibrated, adapt: Make, folder: Path
) -> None:
    with pytest.raises(AdapterError, match=r"load the base it was made for, .*without another"):
        load_for_training(adapt(calibrated()), folder)


def stored_residual(
    calibrated: Calibrated, folder: Path, architecture: str = "llama", **options: Any
) -> nn.Module:
    """Does what `init --residual weight --save-base` does; returns the stored base, reloaded."""
    model, covariances = calibrated(architecture)
    options = {"mode": "ipm", "rank": 4} | options
    config = CordaConfig(residual="weight", progress=False, **options)
    adapter = corda_adapter(model, covariances, config)
    write_adapter(adapter, folder)
    assert adapter.initial is not None
    subtract_initial(model, adapter.initial)
    model.save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_stored_residual_base_is_not_subtracted_from_twice(
    calibrated: Calibrated,
    logits: Logits,
    same_logits: Callable[..., bool],
    tmp_path: Path,
    architecture: str,
    use_peft: bool,
) -> None:
    base = stored_residual(calibrated, tmp_path, architecture)
    untouched, _ = calibrated(architecture)
    initial = read_adapter(tmp_path).initial
    assert initial is not None
    assert residual_marker(base) == initial_checksum(initial)
    assert residual_marker(untouched) is None
    before = {name: value.clone() for name, value in base.state_dict().items()}
    parameters = dict(base.named_parameters())

    model = load_for_training(base, tmp_path, use_peft=use_peft)
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())
    assert same_logits(logits(model), untouched)
    from_untouched = load_for_training(calibrated(architecture)[0], tmp_path, use_peft=use_peft)
    assert torch.equal(logits(from_untouched), logits(model))


def test_weights_of_the_residual_are_those_without_the_initial_product(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    base = stored_residual(calibrated, tmp_path)
    untouched, _ = calibrated()
    initial = read_adapter(tmp_path).initial
    assert initial is not None
    for name, part in initial.items():
        weight = linear_weight(untouched.get_submodule(name))
        expected = weight.double() - part.scaling * part.B.double() @ part.A.double()
        found = linear_weight(base.get_submodule(name))
        # One rounding of W', and those of a product of rank 4 in float32.
        assert (found - expected).norm() < torch.finfo(torch.float32).eps * weight.norm()
        assert (found - weight).norm() > 0.1 * weight.norm()


def test_the_residual_of_another_adapter_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    base = stored_residual(calibrated, tmp_path / "first")
    stored_residual(calibrated, tmp_path / "second", mode="kpm")
    with pytest.raises(AdapterError, match="is the residual of another adapter: load the untouch"):
        load_for_training(base, tmp_path / "second")


def test_a_residual_gets_no_new_adapter(
    calibrated: Calibrated, folder: Path, tmp_path: Path
) -> None:
    base = stored_residual(calibrated, tmp_path / "residual")
    for residual in (None, "weight"):
        config = CordaConfig("ipm", rank=4, residual=residual, progress=False)
        with pytest.raises(ModelError, match=r"is the residual that an adapter left .*untouched"):
            init_corda(base, calibrated()[1], config)
    # Nor one that was made for the untouched base.
    for use_peft in (True, False):
        with pytest.raises(AdapterError, match="is the residual of another adapter: load the unt"):
            load_for_training(base, folder, use_peft=use_peft)


def test_the_folder_of_a_nameless_base_names_none(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    for residual, expected in ((None, None), ("weight", "residual of ")):
        model, covariances = calibrated()
        model.name_or_path = ""
        save_adapter(adapt((model, covariances), residual=residual), tmp_path)
        assert described(tmp_path)["base_model_name_or_path"] == expected
        assert "base_model:" not in (tmp_path / "README.md").read_text()


def test_a_merged_published_adapter_is_no_residual_any_more(
    calibrated: Calibrated, published: Path
) -> None:
    merged = merge(load_for_training(calibrated()[0], published))
    assert residual_marker(merged) is None
    for note in ("corda_record", "corda_initial"):
        assert not hasattr(merged, note)
