from __future__ import annotations

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
from corda_kernels.errors import AdapterError, ModelError, OutputError
from corda_kernels.initialization import (
    adapter_of,
    read_adapter,
    residual_marker,
    subtract_initial,
    write_adapter,
)
from corda_kernels.linears import linear_weight
from corda_kernels.pipeline import corda_adapter, init_corda

Calibrated = Callable[..., tuple[nn.Module, Any]]
Make = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path) -> Path:
    """The folder of a trained adapter."""
    save_adapter(train(adapt(calibrated(), use_peft=False)), tmp_path / "adapter")
    return tmp_path / "adapter"


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in adapter_of(model).layers.items()
        for factor in ("A", "B", "A0", "B0")
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


@pytest.mark.parametrize(
    ("architecture", "residual", "step", "trained", "saves_peft", "loads_peft"),
    [
        ("llama", "pair", None, True, True, True),
        ("llama", "pair", None, True, False, False),
        ("llama", "pair", "lora", False, True, True),
        ("llama", "pair", "lora", False, True, False),
        ("llama", "weight", "lora", True, False, True),
        ("llama", "weight", "lora", True, False, False),
        ("gpt2", "pair", "lora", True, True, False),
        ("gpt2", "weight", None, True, False, True),
        ("mixtral", "pair", "lora", True, True, True),
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
    residual: str,
    step: str | None,
    trained: bool,
    saves_peft: bool,
    loads_peft: bool,
) -> None:
    model = adapt(calibrated(architecture), use_peft=saves_peft, residual=residual, step=step)
    if trained:
        train(model)
    save_adapter(model, tmp_path)
    loaded = load_for_training(calibrated(architecture)[0], tmp_path, use_peft=loads_peft)
    assert isinstance(loaded, PeftModel) == loads_peft
    assert same(factors(loaded), factors(model))
    assert adapter_of(loaded).record == adapter_of(model).record
    if saves_peft == loads_peft:
        assert torch.equal(logits(loaded), logits(model))
    else:  # the pair's two products are added in another order
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(adapter_of(model).layers)
    save_adapter(loaded, tmp_path / "again")
    for file in (WEIGHTS, CONFIG, "corda.json", f"corda_initial/{WEIGHTS}"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_a_loaded_adapter_trains_on(
    calibrated: Calibrated, train: Make, logits: Logits, folder: Path
) -> None:
    model = load_for_training(calibrated()[0], folder)
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
def test_the_folder_is_laid_out_as_stock_peft_does(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, architecture: str, targets: str
) -> None:
    ours, theirs, stock = tmp_path / "ours", tmp_path / "theirs", tmp_path / "stock"
    model = adapt(calibrated(architecture))
    save_adapter(model, ours)
    model.save_pretrained(theirs)
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=targets.split(),
        task_type="CAUSAL_LM",
        fan_in_fan_out=architecture == "gpt2",
    )
    get_peft_model(calibrated(architecture)[0], config).save_pretrained(stock)

    plain = load_file(stock / WEIGHTS)
    for part in ("", "corda_initial"):
        mine = load_file(ours / part / WEIGHTS)
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
            k: (v.shape, v.dtype) for k, v in plain.items()
        }
        assert same(load_file(theirs / part / WEIGHTS), mine)
        described = json.loads((ours / part / CONFIG).read_text())
        for other in (stock / CONFIG, theirs / part / CONFIG):
            expected = json.loads(other.read_text())
            for listed in (described, expected):
                listed["target_modules"] = sorted(listed["target_modules"])
            assert described == expected
    assert json.loads((theirs / "corda.json").read_text()) == json.loads(
        (ours / "corda.json").read_text()
    )


@pytest.mark.parametrize("step", [None, "lora"])
def test_stock_peft_runs_the_pair(
    calibrated: Calibrated,
    adapt: Make,
    train: Make,
    logits: Logits,
    tmp_path: Path,
    step: str | None,
) -> None:
    model = train(adapt(calibrated(), step=step))
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(calibrated()[0], tmp_path)
    stock.load_adapter(tmp_path / "corda_initial", "corda_initial")
    assert not torch.allclose(logits(stock), logits(model), atol=0.1)
    stock.base_model.set_adapter(["default", "corda_initial"])
    assert torch.equal(logits(stock), logits(model))


def test_saving_again_replaces_the_adapter(
    calibrated: Calibrated, adapt: Make, train: Make, tmp_path: Path
) -> None:
    model = adapt(calibrated())
    save_adapter(model, tmp_path)
    fresh = read_adapter(tmp_path).layers[FIRST].A
    save_adapter(train(model), tmp_path)
    assert not read_adapter(tmp_path).layers[FIRST].A.equal(fresh)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {WEIGHTS, CONFIG, "corda.json", f"corda_initial/{WEIGHTS}"} | {
        f"corda_initial/{CONFIG}"
    }


def test_a_record_that_cannot_be_written_leaves_the_adapter_alone(folder: Path) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    adapter = read_adapter(folder)
    adapter.record.calibration["data"] = "\udce9"
    adapter.layers[FIRST].A.zero_()
    with pytest.raises(UnicodeEncodeError):
        write_adapter(adapter, folder)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_output_that_is_a_file_is_refused(
    calibrated: Calibrated, adapt: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file already"):
        save_adapter(adapt(calibrated()), tmp_path / "file")


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    value = json.loads((folder / "corda.json").read_text())
    change(value)
    (folder / "corda.json").write_text(json.dumps(value))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def key(factor: str) -> str:
    return f"base_model.model.{FIRST}.lora_{factor}.weight"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such adapter folder"),
    "no record": (lambda f: (f / "corda.json").unlink(), "has no corda.json: it was not written"),
    "record cut": (lambda f: truncate(f / "corda.json"), "corda.json is not JSON .*copy it again"),
    "record empty": (lambda f: (f / "corda.json").write_text(""), "corda.json is not JSON"),
    "record binary": (lambda f: (f / "corda.json").write_bytes(b"\xff"), "corda.json is not JSON"),
    "field gone": (lambda f: edit(f, lambda v: v.pop("layers")), "field 'layers' is missing"),
    "field added": (lambda f: edit(f, lambda v: v.update(x=1)), "field 'x' is missing or unknown"),
    "later format": (lambda f: edit(f, lambda v: v.update(format="2")), "has format '2'"),
    "another rank": (
        lambda f: edit(f, lambda v: v["layers"][FIRST].update(rank=5)),
        f"lacks factors of rank 5 for layer {FIRST}: its files belong to different adapters",
    ),
    "no initial": (
        lambda f: shutil.rmtree(f / "corda_initial"),
        "corda_initial/.* is missing: it holds the initial factors, without which",
    ),
    "no trained": (lambda f: (f / WEIGHTS).unlink(), "is missing: it holds the trained factors"),
    "trained cut": (lambda f: truncate(f / WEIGHTS), "is truncated or not a safetensors file"),
    "initial cut": (
        lambda f: truncate(f / "corda_initial" / WEIGHTS),
        f"corda_initial/{WEIGHTS} is truncated or not a safetensors file .*copy it again",
    ),
    "layer gone": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(key("A"))),
        f"lacks factors of rank 4 for layer {FIRST}",
    ),
    "initial layer gone": (
        lambda f: edit_tensors(f / "corda_initial" / WEIGHTS, lambda t: t.pop(key("B"))),
        f"lacks factors of rank 4 for layer {FIRST}",
    ),
    "layer of another rank": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({key("A"): torch.ones(5, 32)})),
        f"lacks factors of rank 4 for layer {FIRST}",
    ),
    "initial changed by one bit": (
        lambda f: edit_tensors(
            f / "corda_initial" / WEIGHTS, lambda t: t[key("A")].view(torch.int32)[0, 0].add_(1)
        ),
        "the initial factors in .*corda_initial are not those that this adapter started from",
    ),
    "initial trained": (
        lambda f: shutil.copy(f / WEIGHTS, f / "corda_initial" / WEIGHTS),
        "are not those that this adapter started from: copy that folder again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(calibrated: Calibrated, folder: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(AdapterError, match=message):
        load_for_training(calibrated()[0], folder)
    with pytest.raises(AdapterError, match=message):
        export_lora(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda v: v["layers"].update({FIRST: {}}), id="a layer without fields"),
        pytest.param(lambda v: v["base"].clear(), id="a base without fields"),
        pytest.param(lambda v: v["layers"][FIRST].update(scaling=2.0), id="another scaling"),
    ],
)
def test_a_record_altered_inside_is_refused(
    calibrated: Calibrated, folder: Path, change: Callable[[Any], None]
) -> None:
    edit(folder, change)
    with pytest.raises(AdapterError):
        load_for_training(calibrated()[0], folder)


def test_a_record_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / "corda.json").write_text("[]")
    with pytest.raises(AdapterError):
        read_adapter(folder)


def test_initial_factors_of_another_adapter_are_refused(
    calibrated: Calibrated, adapt: Make, folder: Path
) -> None:
    other = folder.parent / "other"
    save_adapter(adapt(calibrated(), mode="kpm"), other)
    shutil.rmtree(folder / "corda_initial")
    shutil.copytree(other / "corda_initial", folder / "corda_initial")
    with pytest.raises(AdapterError, match="not those that this adapter started from: copy that"):
        load_for_training(calibrated()[0], folder)


def perturbed(calibrated: Calibrated) -> nn.Module:
    model, _ = calibrated()
    for parameter in model.parameters():
        parameter.data *= 1.02
    return model


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
    calibrated: Calibrated, folder: Path, base: Callable[[Calibrated], nn.Module], message: str
) -> None:
    other = base(calibrated)
    with pytest.raises(AdapterError, match=message):
        load_for_training(other, folder)
    assert not any("lora" in name for name, _ in other.named_modules())


@pytest.mark.parametrize("residual", ["pair", "weight"])
@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_a_narrow_dtype_is_accepted(
    calibrated: Calibrated,
    adapt: Make,
    logits: Logits,
    tmp_path: Path,
    dtype: torch.dtype,
    use_peft: bool,
    residual: str,
) -> None:
    save_adapter(adapt(calibrated(), residual=residual), tmp_path)
    base, _ = calibrated()
    model = load_for_training(base.to(dtype), tmp_path, use_peft=use_peft)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found, expected = logits(model), logits(calibrated()[0])
    assert found.dtype == dtype
    # Three times the 1.4 epsilons measured.
    assert (found - expected).norm() < 4.2 * torch.finfo(dtype).eps * expected.norm()
    save_adapter(model, tmp_path / "again")


def test_a_base_in_float64_is_accepted(calibrated: Calibrated, adapt: Make, tmp_path: Path) -> None:
    model, covariances = calibrated()
    save_adapter(adapt((model.double(), covariances)), tmp_path)


@pytest.mark.parametrize("use_peft", [True, False])
def test_changed_initial_factors_in_a_model_are_noticed(
    calibrated: Calibrated, adapt: Make, tmp_path: Path, use_peft: bool
) -> None:
    model = adapt(calibrated(), use_peft=use_peft).half()
    for use in (merge, lambda m: save_adapter(m, tmp_path), lambda m: export_lora(m, tmp_path)):
        with pytest.raises(AdapterError, match="were trained, overwritten or cast; load the adap"):
            use(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: m, "carries no adapter of this package: attach one with init_corda"),
        (
            lambda m: get_peft_model(m, LoraConfig(target_modules="all-linear")),
            "this PeftModel was not made by corda_kernels: load its folder with load_for_training",
        ),
    ],
    ids=["plain", "PeftModel"],
)
def test_a_model_without_our_adapter_is_refused(
    calibrated: Calibrated, tmp_path: Path, wrap: Make, message: str
) -> None:
    model = wrap(calibrated()[0])
    for use in (merge, lambda m: save_adapter(m, tmp_path), lambda m: export_lora(m, tmp_path)):
        with pytest.raises(AdapterError, match=message):
            use(model)


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
    config = CordaConfig("ipm", rank=4, residual="weight", progress=False, **options)
    adapter = corda_adapter(model, covariances, config)
    write_adapter(adapter, folder)
    subtract_initial(model, adapter)
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
    base = stored_residual(calibrated, tmp_path, architecture, step="lora")
    untouched, _ = calibrated(architecture)
    assert residual_marker(base) == read_adapter(tmp_path).record.initial_sha256
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
    for name, layer in read_adapter(tmp_path).layers.items():
        weight = linear_weight(untouched.get_submodule(name))
        expected = weight.double() - layer.scaling * layer.B0.double() @ layer.A0.double()
        found = linear_weight(base.get_submodule(name))
        # One rounding of W', and those of a product of rank 4 in float32.
        assert (found - expected).norm() < torch.finfo(torch.float32).eps * weight.norm()
        assert (found - weight).norm() > 0.1 * weight.norm()


def test_the_residual_of_another_adapter_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    base = stored_residual(calibrated, tmp_path / "first")
    stored_residual(calibrated, tmp_path / "second", balance="paper", step="lora")
    with pytest.raises(AdapterError, match="is the residual of another adapter: load the untouch"):
        load_for_training(base, tmp_path / "second")


def test_a_residual_gets_no_new_adapter(calibrated: Calibrated, tmp_path: Path) -> None:
    base = stored_residual(calibrated, tmp_path)
    for residual in ("pair", "weight"):
        config = CordaConfig("ipm", rank=4, residual=residual, progress=False)
        with pytest.raises(ModelError, match=r"is the residual that an adapter left .*untouched"):
            init_corda(base, calibrated()[1], config)
