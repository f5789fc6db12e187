"""The contract of PEFT's `preprocess_corda`, held to PEFT's own numbers and to float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda as peft_own
from torch import Tensor, nn

from corda_kernels.calibration import watched
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.errors import (
    CacheError,
    CalibrationError,
    CompatibilityWarning,
    ConfigError,
    OutOfMemoryWarning,
    RankError,
    TargetError,
)
from corda_kernels.linears import linear_weight
from corda_kernels.peft_corda import preprocess_corda

LAYERS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
TEMPORARY = ["sample_count", "covariance_matrix", "corda_method", "rank"]

Found = dict[str, Any]


def lora(targets: Any = LAYERS["llama"], *, r: int = 4, method: str = "ipm", **corda: Any) -> Any:
    return LoraConfig(
        r=r,
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method, **corda),
    )


def eigens(model: nn.Module) -> Found:
    return {
        name: module.eigens for name, module in model.named_modules() if "eigens" in vars(module)
    }


@pytest.fixture
def make(tiny_model: Callable[..., nn.Module]) -> Callable[..., tuple[nn.Module, Any]]:
    """A model and a `run_model` of 12 sequences, one at a time; always the same."""

    def give(architecture: str = "llama") -> tuple[nn.Module, Callable[[], None]]:
        torch.manual_seed(0)
        model = tiny_model(architecture, initializer_range=0.1)
        ids = torch.randint(3, 64, (12, 1, 24))

        @torch.no_grad()
        def run() -> None:
            for batch in ids:
                model(input_ids=batch)

        return model, run

    return give


def tail_energy(weight: Tensor, covariance: Tensor, U: Tensor) -> float:
    """Energy that span U has in W(C + 0.01·mean·I), over the least that any such span has."""
    C = covariance.double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    M = weight.double() @ C
    least = torch.linalg.svdvals(M)[-U.shape[1] :]
    return float((torch.linalg.qr(U.double()).Q.mT @ M).norm() / least.norm())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_components_are_pefts(make: Any, architecture: str, method: str) -> None:
    """GPT-2 has Conv1D layers, whose weights lie the other way round."""
    peft, run_peft = make(architecture)
    ours, run_ours = make(architecture)
    config = lora(LAYERS[architecture], method=method, prune_temporary_fields=False)
    peft_own(peft, config, run_peft)
    preprocess_corda(ours, config, run_ours)

    expected = eigens(peft)
    found = eigens(ours)
    assert list(found) == list(expected)
    for name, truth in expected.items():
        mine, layer = found[name], ours.get_submodule(name)
        outputs, inputs = linear_weight(layer).shape
        assert mine.S_WC.shape == (4,)
        assert mine.U_WC.shape == (outputs, 4)
        assert mine.V_WC.shape == (inputs, 4)
        assert {part.dtype for part in vars(mine).values()} == {torch.float32}
        assert torch.equal(mine.S_WC, mine.S_WC.sort(descending=True).values)
        covariance = peft.get_submodule(name).covariance_matrix
        torch.testing.assert_close(layer.covariance_matrix, covariance, rtol=1e-5, atol=1e-6)
        assert layer.sample_count == peft.get_submodule(name).sample_count == 12
        if method == "ipm":
            torch.testing.assert_close(mine.S_WC, truth.S_WC, rtol=1e-4, atol=0)
            assert torch.linalg.svdvals(mine.U_WC.mT @ truth.U_WC).min() > 0.9999
        energies = [
            tail_energy(linear_weight(layer).detach(), covariance, each.U_WC)
            for each in (mine, truth)
        ]
        assert energies[0] <= energies[1] * (1 + 1e-5)
        product = mine.U_WC * mine.S_WC @ mine.V_WC.mT
        U = mine.U_WC.double()
        projected = U @ (U.mT @ linear_weight(layer).double())
        assert (product - projected).norm() <= 1e-5 * projected.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_adapted_model_computes_what_the_base_does(make: Any, architecture: str) -> None:
    model, run = make(architecture)
    ids = torch.randint(3, 64, (2, 12))
    with torch.no_grad():
        expected = model(ids).logits
        config = lora(LAYERS[architecture])
        config.fan_in_fan_out = architecture == "gpt2"
        preprocess_corda(model, config, run)
        adapted = get_peft_model(model, config)
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert (adapted(ids).logits - expected).abs().max() > 0.01
    assert not eigens(model)


@pytest.mark.filterwarnings("ignore:.*rank_pattern:UserWarning")
def test_rank_pattern_gives_layers_ranks_of_their_own(make: Any) -> None:
    model, run = make()
    config = lora()
    config.rank_pattern = {"q_proj": 6, "layers.1.mlp.up_proj": 2}
    preprocess_corda(model, config, run)
    ranks = {name.removeprefix("model."): len(e.S_WC) for name, e in eigens(model).items()}
    assert ranks.pop("layers.0.self_attn.q_proj") == ranks.pop("layers.1.self_attn.q_proj") == 6
    assert ranks.pop("layers.1.mlp.up_proj") == 2
    assert set(ranks.values()) == {4}
    get_peft_model(model, config)


def test_temporary_fields_are_gone_unless_asked_for(make: Any) -> None:
    model, run = make()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    preprocess_corda(model, lora(prune_temporary_fields=False), run)
    assert (layer.sample_count, layer.corda_method, layer.rank) == (12, "ipm", 4)
    assert layer.covariance_matrix.shape == (32, 32)
    preprocess_corda(model, lora(), run)
    assert [field for field in TEMPORARY if hasattr(layer, field)] == []


def test_another_model_may_be_run_than_the_one_prepared(make: Any) -> None:
    model, _ = make()
    hooked, run = make()
    hooked.extra = nn.Linear(32, 32)
    preprocess_corda(model, lora(), run, hooked)
    alone, run_alone = make()
    preprocess_corda(alone, lora(), run_alone)
    assert not eigens(hooked)
    for name, found in eigens(alone).items():
        assert torch.equal(eigens(model)[name].S_WC, found.S_WC)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_run_model_may_run_in_inference_mode(make: Any, mode: Any) -> None:
    model, run = make()
    preprocess_corda(model, lora(prune_temporary_fields=False), mode()(run))
    assert not model.model.layers[0].mlp.up_proj.covariance_matrix.is_inference()
    get_peft_model(model, lora())


def test_a_part_of_the_model_may_be_run_alone(make: Any) -> None:
    """The decoder without its head, padded."""
    model, _ = make()
    whole = copy.deepcopy(model)
    ids = torch.randint(3, 64, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    config = lora(prune_temporary_fields=False)
    preprocess_corda(model, config, lambda: model.model(input_ids=ids, attention_mask=mask))
    preprocess_corda(whole, config, lambda: whole(ids, mask))
    layer = "model.layers.1.mlp.down_proj"
    assert torch.equal(
        model.get_submodule(layer).covariance_matrix, whole.get_submodule(layer).covariance_matrix
    )


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("damping", [0.01, None])
@pytest.mark.parametrize("case", ["dead channels", "one token", "W = 0", "rank-deficient W"])
def test_degenerate_components_are_finite(case: str, damping: float | None, method: str) -> None:
    model = nn.Sequential(nn.Linear(12, 10, bias=False))
    x = torch.randn(1, 40, 12)
    if case == "dead channels":
        x[..., :9] = 0
    elif case == "one token":
        x = x[:, :1]
    elif case == "W = 0":
        nn.init.zeros_(model[0].weight)
    else:
        model[0].weight.data[3:] = model[0].weight.data[:1]
    weight = model[0].weight.detach().clone()
    config = lora(["0"], r=8, method=method)
    preprocess_corda(model, config, lambda: model(x), damping=damping)
    found = vars(model[0].eigens)
    assert all(torch.isfinite(part).all() for part in found.values())
    assert torch.equal(found["S_WC"], found["S_WC"].sort(descending=True).values)
    assert bool((found["S_WC"] > 0).all())
    adapted = get_peft_model(model, config)
    lora_layer = adapted.base_model.model[0]
    product = lora_layer.lora_B["default"].weight @ lora_layer.lora_A["default"].weight
    assert (
        product * lora_layer.scaling["default"] + lora_layer.base_layer.weight - weight
    ).norm() <= 1e-5


def test_files_of_either_are_read_by_the_other(make: Any, tmp_path: Path) -> None:
    def config(maker: str) -> Any:
        return lora(
            cache_file=str(tmp_path / maker / "cache.pt"),
            covariance_file=str(tmp_path / maker / "covariance.pt"),
        )

    def agree(one: nn.Module, other: nn.Module) -> None:
        for name, found in eigens(one).items():
            torch.testing.assert_close(found.S_WC, eigens(other)[name].S_WC, rtol=1e-4, atol=0)

    peft, run = make()
    peft_own(peft, config("peft"), run)
    ours, run = make()
    preprocess_corda(ours, config("ours"), run)
    files = [
        torch.load(tmp_path / maker / "covariance.pt", weights_only=True)
        for maker in ("peft", "ours")
    ]
    assert list(files[0]) == list(files[1])
    caches = [
        torch.load(tmp_path / maker / "cache.pt", weights_only=True) for maker in ("peft", "ours")
    ]
    assert list(caches[0]) == list(caches[1])

    for _ in range(2):  # from the cache, then from the covariances
        other, _ = make()
        peft_own(other, config("ours"))
        agree(other, ours)
        with pytest.warns(CompatibilityWarning, match="has no notes beside it"):
            preprocess_corda(other, config("peft"))
        agree(other, peft)
        for maker in ("peft", "ours"):
            (tmp_path / maker / "cache.pt").unlink()
    assert (tmp_path / "peft" / "cache.pt.json").exists()


def test_the_covariance_file_serves_other_methods_and_ranks(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "covariance.pt"
    model, run = make()
    preprocess_corda(model, lora(covariance_file=file), run)
    stored = torch.load(file, weights_only=True)
    addresses = {matrix.data_ptr() for matrix in stored.values()}
    assert (len(stored), len(addresses)) == (14, 8)

    fresh, run = make()
    preprocess_corda(fresh, lora(r=6, method="kpm"), run)
    preprocess_corda(
        model, lora(r=6, method="kpm", covariance_file=file, prune_temporary_fields=False)
    )
    for name, found in eigens(model).items():
        torch.testing.assert_close(found.S_WC, eigens(fresh)[name].S_WC)
    assert model.model.layers[0].mlp.up_proj.sample_count == 12
    with pytest.raises(CacheError, match="normalize='peft', but 'tokens' is asked for"):
        preprocess_corda(model, lora(covariance_file=file), normalize="tokens")


def test_reading_a_cache_twice_gives_the_same(make: Any, tmp_path: Path) -> None:
    """PEFT divides S in place by its scaling; the file must not notice."""
    file = tmp_path / "cache.pt"
    model, run = make()
    config = lora(cache_file=file)
    config.lora_alpha = 32
    preprocess_corda(model, config, run)
    before = file.read_bytes()
    for _ in range(2):
        again, _ = make()
        preprocess_corda(again, config)
        S = eigens(again)["model.layers.0.mlp.up_proj"].S_WC.clone()
        assert torch.equal(
            S, torch.load(file, weights_only=True)["model.layers.0.mlp.up_proj.eigens.S_WC"]
        )
        get_peft_model(again, config)
    assert file.read_bytes() == before


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"x" + b[1:], lambda _: b"text"]
)
def test_a_damaged_file_is_refused(make: Any, tmp_path: Path, damage: Any, noted: bool) -> None:
    file = tmp_path / "cache.pt"
    model, run = make()
    preprocess_corda(model, lora(cache_file=file), run)
    file.write_bytes(damage(file.read_bytes()))
    if not noted:
        (tmp_path / "cache.pt.json").unlink()
    message = "not match the checksum" if noted else "is truncated or was not written by PEFT"
    with pytest.raises(CacheError, match=message):
        preprocess_corda(model, lora(cache_file=file))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "corda_kernels.peft/0"}'])
def test_damaged_notes_are_refused(make: Any, tmp_path: Path, content: str) -> None:
    file = tmp_path / "cache.pt"
    model, run = make()
    preprocess_corda(model, lora(cache_file=file), run)
    (tmp_path / "cache.pt.json").write_text(content)
    with pytest.raises(CacheError, match=r"cache\.pt\.json is (damaged|not of this version)"):
        preprocess_corda(model, lora(cache_file=file))


def test_files_of_another_model_are_refused(make: Any, tmp_path: Path) -> None:
    model, run = make()
    config = lora(["up_proj"], cache_file=tmp_path / "a.pt", covariance_file=tmp_path / "b.pt")
    preprocess_corda(model, config, run)
    for file in (tmp_path / "a.pt", tmp_path / "b.pt"):
        kind = "cache_file" if file.stem == "a" else "covariance_file"
        other = nn.Sequential()
        other.up_proj = nn.Linear(32, 48)
        with pytest.raises(CacheError, match=r"other layers \(model\.layers\.0\.mlp\.up_proj\)"):
            preprocess_corda(other, lora(["up_proj"], **{kind: file}))
        with pytest.raises(CalibrationError, match=r"7 target layer\(s\) are not in|are not in"):
            preprocess_corda(model, lora(["down_proj"], **{kind: file}))


class Cramped:
    """A device without memory for sums of layer 1; counts the first calls of a layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[bool] = []
        join = InputCapture._join_or_found

        def cramped(capture: InputCapture, name: str, *arguments: Any) -> None:
            if name.startswith("model.layers.1"):
                self.tried.append(capture.on_host)
                if not capture.on_host:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            join(capture, name, *arguments)

        monkeypatch.setattr(InputCapture, "_join_or_found", cramped)
        monkeypatch.setattr(watched, "has_own_memory", lambda device: True)


@pytest.mark.parametrize("memory_limit", [None, 10_000])
def test_sums_that_a_device_has_no_memory_for_are_made_on_the_host(
    make: Any, monkeypatch: pytest.MonkeyPatch, memory_limit: int | None
) -> None:
    model, run = make()
    preprocess_corda(model, lora(), run)
    expected = {name: part.S_WC for name, part in eigens(model).items()}
    cramped = Cramped(monkeypatch)
    with pytest.warns(
        OutOfMemoryWarning, match=r"called again with sums on the CPU.* 1 call\(s\)"
    ) as caught:
        preprocess_corda(model, lora(), run, memory_limit=memory_limit)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert cramped.tried.count(False) == 1  # it is not tried again for each part
    for name, part in eigens(model).items():
        torch.testing.assert_close(part.S_WC, expected[name])


def test_memory_that_runs_out_on_the_host_is_the_callers_matter(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = make()
    Cramped(monkeypatch)
    monkeypatch.setattr(watched, "has_own_memory", lambda device: False)
    with pytest.raises(torch.OutOfMemoryError):
        preprocess_corda(model, lora(), run)


def test_text_that_is_used_up_when_memory_runs_out_is_missed(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = make()
    sequences = iter([torch.full((1, 24), 3), torch.full((1, 16), 4), torch.full((1, 8), 5)])
    add, added = InputCapture._add, []

    def cramped(capture: InputCapture, *arguments: Any) -> None:
        added.append(capture.on_host)
        if len(added) == 10:  # in the second sequence
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(capture, *arguments)

    monkeypatch.setattr(InputCapture, "_add", cramped)
    monkeypatch.setattr(watched, "has_own_memory", lambda device: True)

    def run_model() -> None:
        for ids in sequences:
            model(ids)

    with (
        pytest.warns(OutOfMemoryWarning),
        pytest.raises(
            CalibrationError, match=r"in call 2 of the model .* called it 1 time\(s\) only"
        ),
    ):
        preprocess_corda(model, lora(), run_model)


@pytest.mark.parametrize(
    ("options", "corda", "message"),
    [
        ({"normalize": "mean"}, {}, 'normalize must be "'),
        ({"method": "best"}, {}, 'method must be "'),
        ({"on_unseen": "warn"}, {}, 'on_unseen must be "'),
        ({"damping": -1.0}, {}, "damping must be at least 0"),
        ({"memory_limit": 100}, {}, "alone takes 4096 bytes, more than memory_limit=100"),
        ({"memory_limit": 10**9}, {"covariance_file": "c.pt"}, "cannot be combined with"),
        ({"memory_limit": 10**9}, {"prune_temporary_fields": False}, "cannot be combined with"),
        ({}, {"method": None}, r'corda_method must be "ipm" or "kpm"'),
    ],
)
def test_options_that_are_not_allowed_are_refused(
    make: Any, options: Any, corda: Any, message: str
) -> None:
    model, _ = make()
    runs: list[int] = []
    with pytest.raises(ConfigError, match=message):
        preprocess_corda(model, lora(**corda), lambda: runs.append(1), **options)
    assert not runs


def test_run_model_is_needed_where_nothing_is_written(make: Any) -> None:
    with pytest.raises(ConfigError, match="run_model is None"):
        preprocess_corda(make()[0], lora())


def test_layers_that_cannot_be_adapted_are_refused_before_the_work(make: Any) -> None:
    model, _ = make()
    with pytest.raises(RankError, match=r"rank 17 .*layers\.0\.self_attn\.k_proj \(16 × 32\)"):
        preprocess_corda(model, lora(r=17))
    with pytest.raises(TargetError, match=r"no linear layer matches .* end in: down_proj, gate"):
        preprocess_corda(model, lora(["query"]))
    with pytest.raises(TargetError, match=r"holds its weight as torch\.float64"):
        preprocess_corda(model.double(), lora())
    with pytest.raises(TargetError, match="no default for model type None"):
        preprocess_corda(nn.Sequential(nn.Linear(8, 8)), lora(None))
    config = lora(["q_proj"])
    config.target_parameters = ["mlp.experts.gate_up_proj"]
    with pytest.raises(TargetError, match=r"target_parameters=.* have no covariance"):
        preprocess_corda(make()[0], config)


def test_layers_that_peft_takes_for_experts_are_refused_before_the_work(
    tiny_model: Callable[..., nn.Module],
) -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    with pytest.raises(TargetError, match=r"cannot be adapted through PEFT .* leave it out"):
        preprocess_corda(model, lora(["q_proj", "gate_proj", "up_proj"]))


@pytest.mark.parametrize("excluded", [None, ["gate_proj"], r".*gate_proj"])
def test_skipped_layers_join_those_excluded(make: Any, excluded: Any) -> None:
    model, run = make()
    model.model.unused = nn.Linear(32, 32)
    config = lora("all-linear")
    config.exclude_modules = excluded
    with pytest.warns(UserWarning, match=r"model\.unused"):
        preprocess_corda(model, config, run, on_unseen="skip")
    assert len(eigens(model)) == 14 - 2 * (excluded is not None)
    get_peft_model(model, config)
    assert type(model.model.unused) is nn.Linear
