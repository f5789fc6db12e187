"""What users of PEFT's `preprocess_corda` meet: shown on PEFT's own where it can be, cured here."""

from __future__ import annotations

import copy
import importlib
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corda_runs import LAYERS, lora, running, text
from peft import get_peft_model
from peft.tuners.lora.corda import calib_cov_distribution
from peft.tuners.lora.corda import preprocess_corda as peft_own
from torch import Tensor, nn

from corda_kernels.errors import (
    CacheError,
    CalibrationError,
    CompatibilityWarning,
    LeftOutWarning,
    NonFiniteActivationError,
    OutputError,
    PaddingWarning,
    TargetError,
)
from corda_kernels.peft_corda import CordaEigens, patch_peft, preprocess, preprocess_corda

PAD = 0


def covariance_of(model: nn.Module, layer: str = "model.layers.1.mlp.down_proj") -> Tensor:
    return model.get_submodule(layer).covariance_matrix


def eigens(model: nn.Module) -> dict[str, Any]:
    return {
        name: module.eigens for name, module in model.named_modules() if "eigens" in vars(module)
    }


@pytest.fixture
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model("llama", initializer_range=0.1, pad_token_id=PAD)


class Line(nn.Module):
    """One linear layer, fed by hand."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def test_any_batch_size(model: nn.Module) -> None:
    ids = text(6, 16)
    peft, one_by_one, together = (copy.deepcopy(model) for _ in range(3))
    with pytest.raises(RuntimeError, match=r"t\(\) expects"):
        peft_own(peft, lora(), running(peft, ids))

    for each, batches in ((one_by_one, ids.split(1)), (together, ids.split(4))):
        config = lora(prune_temporary_fields=False)
        preprocess_corda(each, config, running(each, *batches), normalize="tokens")
    torch.testing.assert_close(
        covariance_of(together), covariance_of(one_by_one), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(model: nn.Module, side: str) -> None:
    short, long = text(1, 5), text(1, 16, seed=1)
    filler = torch.full((1, 11), PAD)
    padded = torch.cat([filler, short] if side == "left" else [short, filler], 1)
    mask = (padded != PAD).long()
    config = lora(prune_temporary_fields=False)

    apart, batched, peft = (copy.deepcopy(model) for _ in range(3))
    preprocess_corda(apart, config, running(apart, short, long), normalize="tokens")
    both = {
        "input_ids": torch.cat([padded, long]),
        "attention_mask": torch.cat([mask, torch.ones_like(mask)]),
    }
    preprocess_corda(batched, config, running(batched, both), normalize="tokens")
    expected = covariance_of(apart)
    torch.testing.assert_close(covariance_of(batched), expected, rtol=1e-4, atol=1e-5)

    peft_own(peft, config, running(peft, {"input_ids": padded, "attention_mask": mask}, long))
    of_peft = covariance_of(peft)
    shape = of_peft / of_peft.trace() - expected / expected.trace()
    assert shape.norm() > 0.05 * (expected / expected.trace()).norm()


def test_padding_without_a_mask_is_warned_of(model: nn.Module) -> None:
    padded = torch.cat([text(2, 10), torch.full((2, 4), PAD)], 1)
    with pytest.warns(PaddingWarning, match=r"call 1 of the model .* no attention mask"):
        preprocess_corda(model, lora(), running(model, text(2, 14), padded))


def test_padding_under_a_mask_that_does_not_tell_it_is_warned_of(model: nn.Module) -> None:
    padded = torch.cat([text(2, 10), torch.full((2, 4), PAD)], 1)
    causal = torch.ones(14, 14).tril().bool().expand(2, 1, 14, 14)
    batch = {"input_ids": padded, "attention_mask": causal}
    with pytest.warns(PaddingWarning, match=r"call 0 .* no attention mask of \(batch, tokens\)"):
        preprocess_corda(model, lora(), running(model, batch))


def test_padding_of_earlier_tokens_in_a_cache_is_not_mistaken_for_the_present_ones(
    model: nn.Module,
) -> None:
    """As in `generate`: the mask grows, and the tokens run are its last ones."""
    prompt = text(2, 6)
    prompt[0, :3] = PAD
    mask = (prompt != PAD).long()
    config = lora(prune_temporary_fields=False)

    def run() -> None:
        cache = model(input_ids=prompt, attention_mask=mask).past_key_values
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        model(input_ids=text(2, 1, seed=3), attention_mask=longer, past_key_values=cache)

    seen: list[Tensor] = []
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    preprocess_corda(model, config, run, normalize="tokens")
    rows = torch.cat([seen[0][mask.bool()], seen[1].flatten(0, 1)])
    torch.testing.assert_close(layer.covariance_matrix, rows.T @ rows / len(rows))


def test_float16_sum_does_not_overflow() -> None:
    config = lora(["proj"], use_float16_for_covariance=True, prune_temporary_fields=False)
    calls = [torch.ones(1, 8192, 4, dtype=torch.float16)] * 9

    peft = Line(torch.float16)
    calib_cov_distribution(peft, config, running(peft, *calls), None, None)
    # From here PEFT's loop doubles its damping for ever.
    assert not torch.isfinite(peft.proj.covariance_matrix).any()

    ours = Line(torch.float16)
    with pytest.warns(CompatibilityWarning, match="use_float16_for_covariance is not followed"):
        preprocess_corda(ours, config, running(ours, *calls))
    assert torch.equal(ours.proj.covariance_matrix, torch.full((4, 4), 8192.0))
    assert torch.isfinite(ours.proj.eigens.V_WC).all()


def test_a_covariance_that_overflowed_where_it_was_made_ends_in_an_error(tmp_path: Path) -> None:
    file = tmp_path / "covariance.pt"
    torch.save({"proj": torch.full((4, 4), torch.inf, dtype=torch.float16)}, file)
    config = lora(["proj"], covariance_file=str(file))
    with (
        pytest.warns(CompatibilityWarning, match="no notes"),
        pytest.raises(CacheError, match=r"16 NaN or Inf in proj"),
    ):
        preprocess_corda(Line(), config)


def test_bfloat16_sum_does_not_stall() -> None:
    config = lora(["proj"], use_float16_for_covariance=True, prune_temporary_fields=False)
    calls = [torch.ones(1, 1, 4, dtype=torch.bfloat16)] * 512

    peft = Line(torch.bfloat16)
    calib_cov_distribution(peft, config, running(peft, *calls), None, None)
    assert float(peft.proj.covariance_matrix[0, 0]) == 0.5

    ours = Line(torch.bfloat16)
    with pytest.warns(CompatibilityWarning):
        preprocess_corda(ours, config, running(ours, *calls))
    assert float(ours.proj.covariance_matrix[0, 0]) == 1.0


def test_cache_file_without_a_folder(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peft = copy.deepcopy(model)
    with pytest.raises(FileNotFoundError):
        peft_own(peft, lora(cache_file="c.pt"), running(peft, text(1, 16)))
    assert not Path("c.pt").exists()

    preprocess_corda(model, lora(cache_file="c.pt"), running(model, text(1, 16)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt", "c.pt.json"]


def test_paths_are_checked_before_the_work(model: nn.Module, tmp_path: Path) -> None:
    def run() -> None:
        raise AssertionError("the model was run")

    for kind in ("cache_file", "covariance_file"):
        with pytest.raises(OutputError, match="is a folder already"):
            preprocess_corda(model, lora(**{kind: tmp_path}), run)


def test_a_target_never_called(model: nn.Module) -> None:
    targets = [*LAYERS, "unused"]
    model.model.unused = nn.Linear(32, 32)
    peft = copy.deepcopy(model)
    with pytest.raises(ZeroDivisionError):
        peft_own(peft, lora(targets), running(peft, text(1, 16)))

    with pytest.raises(CalibrationError, match=r"never received a token: model\.unused"):
        preprocess_corda(model, lora(targets), running(model, text(1, 16)))
    assert eigens(model) == {}

    config = lora(targets)
    with pytest.warns(LeftOutWarning, match=r"model\.unused"):
        preprocess_corda(model, config, running(model, text(1, 16)), on_unseen="skip")
    adapted = get_peft_model(model, config)
    assert type(adapted.get_submodule("base_model.model.model.unused")) is nn.Linear
    assert hasattr(adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj"), "lora_A")


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_targets_by_default_and_all_linear(model: nn.Module, targets: str | None) -> None:
    peft = copy.deepcopy(model)
    if targets is None:
        with pytest.raises(TypeError):
            peft_own(peft, lora(None), running(peft, text(1, 16)))
    else:
        peft_own(peft, lora("all-linear"), running(peft, text(1, 16)))
        assert eigens(peft) == {}

    config = lora(targets)
    preprocess_corda(model, config, running(model, text(1, 16)))
    assert len(eigens(model)) == (4 if targets is None else 14)
    assert config.target_modules == targets
    get_peft_model(model, config)  # takes the eigens of every layer that it adapts
    assert eigens(model) == {}


def test_a_stale_cache_is_refused(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    run = running(model, text(1, 16))
    peft_own(model, lora(cache_file=str(file)), run)
    of_ipm = eigens(model)
    peft_own(model, lora(cache_file=str(file), method="kpm"), run)
    assert all(torch.equal(found.S_WC, of_ipm[name].S_WC) for name, found in eigens(model).items())
    file.unlink()

    preprocess_corda(model, lora(cache_file=file), run)
    preprocess_corda(model, lora(cache_file=file))
    with pytest.raises(CacheError, match=r"corda_method='ipm', but 'kpm' is asked for"):
        preprocess_corda(model, lora(cache_file=file, method="kpm"), run)
    with pytest.raises(CacheError, match=r"damping=0\.01, but 0\.5"):
        preprocess_corda(model, lora(cache_file=file), run, damping=0.5)
    with pytest.raises(CacheError, match="normalize='peft', but 'tokens'"):
        preprocess_corda(model, lora(cache_file=file), run, normalize="tokens")
    larger = lora(cache_file=file)
    larger.r = 5
    with pytest.raises(CacheError, match=r"S_WC in shape \(4,\), but .* ask for \(5,\)"):
        preprocess_corda(model, larger, run)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(CacheError, match=r"this model differs by 50\.0%"):
        preprocess_corda(model, lora(cache_file=file), run)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_tied_head_is_refused(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", initializer_range=0.1, tie_word_embeddings=True)
    peft = copy.deepcopy(model)
    config = lora(["lm_head"])
    peft_own(peft, config, running(peft, text(1, 16)))
    get_peft_model(peft, config)
    assert not torch.equal(peft.model.embed_tokens.weight, model.model.embed_tokens.weight)

    with pytest.raises(TargetError, match=r"lm_head shares its weight with model\.embed_tokens"):
        preprocess_corda(model, config, running(model, text(1, 16)))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft"])
def test_hooks_and_modes_are_as_before_after_an_exception(model: nn.Module, ours: bool) -> None:
    calls: list[int] = []
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model.model.layers[1].eval()

    def run() -> None:
        model(text(1, 16))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        (preprocess_corda if ours else peft_own)(model, lora(), run)
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
    modes = [model.training, model.model.layers[1].training]
    if ours:
        assert (hooks, modes) == (1, [True, False])
        model(text(1, 16))
        assert len(calls) == 2
        assert not hasattr(layer, "covariance_matrix")
    else:
        assert (hooks, modes) == (15, [False, False])


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft"])
def test_components_lie_on_their_layers_device(ours: bool) -> None:
    """The model's first parameter lies on another device, as it may with device_map="auto"."""
    model = Line()
    model.first = nn.Embedding(2, 2, device="meta")
    model._modules = {"first": model.first, "proj": model.proj}
    (preprocess_corda if ours else peft_own)(
        model, lora(["proj"]), running(model, torch.randn(1, 20, 4))
    )
    found = model.proj.eigens
    devices = {found.U_WC.device.type, found.S_WC.device.type, found.V_WC.device.type}
    assert devices == ({"cpu"} if ours else {"cpu", "meta"})


def test_an_offloaded_weight_is_refused_before_the_work(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.up_proj is offloaded"):
        preprocess_corda(model, lora())


def test_layers_that_share_an_input_share_one_covariance(model: nn.Module) -> None:
    peft = copy.deepcopy(model)
    counts = []
    for each, run in ((model, preprocess_corda), (peft, peft_own)):
        run(each, lora(prune_temporary_fields=False), running(each, text(1, 16)))
        matrices = [
            module.covariance_matrix
            for module in each.modules()
            if hasattr(module, "covariance_matrix")
        ]
        counts.append(len({matrix.data_ptr() for matrix in matrices}))
    assert counts == [2 * 4, 2 * 7]


def test_covariances_are_freed_and_components_cropped_on_the_way(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    decompose = preprocess.co_svd_layers

    def watched(weights: dict[str, Tensor], matrices: dict[str, Tensor], **options: Any) -> Any:
        held = {id(matrix): weakref.ref(matrix) for matrix in matrices.values()}
        for part in decompose(weights, matrices, **options):
            alive.append(sum(ref() is not None for ref in held.values()))
            yield part
        alive.append(sum(ref() is not None for ref in held.values()))

    monkeypatch.setattr(preprocess, "co_svd_layers", watched)
    preprocess_corda(model, lora(), running(model, text(1, 16)))
    # q, k and v share one covariance, gate and up another; both layers of the model.
    assert alive == [8, 8, 8, 7, 6, 6, 5, 4, 4, 4, 3, 2, 2, 1, 0]
    for name, found in eigens(model).items():
        outputs, inputs = model.get_submodule(name).weight.shape
        assert found.U_WC.untyped_storage().nbytes() == 4 * 4 * outputs
        assert found.V_WC.untyped_storage().nbytes() == 4 * 4 * inputs


def test_covariances_stay_within_a_memory_limit(model: nn.Module) -> None:
    whole = copy.deepcopy(model)
    preprocess_corda(whole, lora(), running(whole, text(1, 16)))
    runs: list[int] = []

    def run() -> None:
        runs.append(1)
        model(text(1, 16))

    preprocess_corda(model, lora(), run, memory_limit=4 * (3 * 32**2 + 48**2))
    assert len(runs) == 4
    for name, found in eigens(model).items():
        torch.testing.assert_close(found.S_WC, eigens(whole)[name].S_WC)


def test_not_a_number_is_named_with_its_layer_and_batch(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = torch.nan
    good = text(2, 8)
    good[good == 7] = 8
    bad = good.clone()
    bad[0, 2] = 7
    peft = copy.deepcopy(model)
    with pytest.raises(ValueError, match="Invalid value found in input, please check"):
        peft_own(peft, lora(), running(peft, bad[:1]))

    with pytest.raises(NonFiniteActivationError, match=r"layers\.0\.self_attn\.q_proj") as caught:
        preprocess_corda(model, lora(), running(model, good, bad))
    error = caught.value
    assert (error.batch, error.tokens, error.broken, error.channels) == (1, (16, 32), 32, 32)


def test_quantised_weights_are_refused_before_the_work(model: nn.Module) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    runs: list[int] = []
    with pytest.raises(TargetError, match=r"layers\.0\.mlp\.up_proj \(Linear\) .* torch\.int8"):
        preprocess_corda(model, lora(), lambda: runs.append(1))
    assert not runs


def test_attrs_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT imports attrs without depending on it."""
    name = "peft.tuners.lora.corda"
    monkeypatch.setitem(sys.modules, "attr", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(name)
    assert caught.value.name == "attr"
    with patch_peft():
        home = importlib.import_module(name)
        assert home.preprocess_corda.__wrapped__ is preprocess_corda
        assert home.CordaEigens is CordaEigens
    assert name not in sys.modules
