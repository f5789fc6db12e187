"""Covariances of fused experts, against an explicit loop over every expert's tokens in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from family_sizes import DECODER
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from corda_kernels import calibrate, calibrate_blocks
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration import run as run_module
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.experts import expert_inputs
from corda_kernels.errors import CalibrationError, CordaWarning, TargetError
from corda_kernels.experts import ExpertParameter, expert_parameters
from corda_kernels.init import CalibrationPlan, covariance_stages
from corda_kernels.targets import target_layers

E = 4
SIZES = DECODER | {
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GROUPED = {"n_routed_experts": E, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": E},
    "qwen2_moe": {"num_experts": E, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": E},
    "deepseek_v3": GROUPED
    | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": None}
    | {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "glm4_moe": GROUPED | {"first_k_dense_replace": 1},
    "gpt_oss": {"num_local_experts": E},
    "llama4_text": {"num_local_experts": E, "intermediate_size_mlp": 48},
    "granitemoe": {"num_local_experts": E},
    "nemotron_h": GROUPED
    | {"layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 24},
}
QUIET = pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
pytestmark = [pytest.mark.slow, QUIET]


def made(kind: str, **changes: Any) -> nn.Module:
    """A tiny model whose every weight counts, biases and routers too."""
    config = AutoConfig.for_model(kind, **SIZES | FAMILIES[kind] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def text(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (2, 7 + i), generator=generator) for i in range(count)]


def rows_read(model: nn.Module, batches: list[Any]) -> dict[str, list[Tensor]]:
    """For each expert projection what its experts read, in float64, by the eager model."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"
    parameters = expert_parameters(model)
    read: dict[str, list[list[Tensor]]] = {name: [] for name in parameters}
    by_module: dict[nn.Module, dict[str, tuple[str, ExpertParameter]]] = {}
    for name, parameter in parameters.items():
        by_module.setdefault(parameter.module, {})[parameter.attribute] = name, parameter

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entries = by_module[module]
        down, _ = entries["down_proj"]
        first = next(attribute for attribute in entries if attribute != "down_proj")
        up, parameter = entries[first]
        hidden, *routing = (*args, *kwargs.values())
        for e in range(parameter.experts):
            if routing:
                x = hidden[[t for t in range(len(hidden)) if e in routing[0][t]]]
            else:  # Llama 4
                x = hidden.view(E, -1, hidden.shape[-1])[e]
                x = x[x.norm(dim=-1) > 0]
            y = x @ parameter.weight(e).T
            if hasattr(module, f"{first}_bias"):
                y = y + getattr(module, f"{first}_bias")[e]
            if first == "up_proj":
                inner = module.act_fn(y)
            elif hasattr(module, "alpha"):  # gpt-oss
                gate, linear = y[:, ::2].clamp(max=module.limit), y[:, 1::2]
                linear = linear.clamp(-module.limit, module.limit)
                inner = (linear + 1) * gate * torch.sigmoid(gate * module.alpha)
            else:
                gate, linear = y.chunk(2, -1)
                inner = module.act_fn(gate) * linear
            for name, rows in ((up, x), (down, inner)):
                read[name][-1].append(rows)

    for module in by_module:
        module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            for calls in read.values():
                calls.append([])
            model(batch)
    return {
        name: [torch.cat(parts) for parts in zip(*calls, strict=True)]
        for name, calls in read.items()
    }


def expected(rows: list[Tensor]) -> list[Tensor]:
    """Each expert's covariance from its tokens, drawn towards the mean of all."""
    total = sum(len(x) for x in rows)
    mean = sum(torch.outer(x, x) for part in rows for x in part) / total
    n0 = mean.trace() ** 2 / mean.square().sum()
    return [(part.T @ part + n0 * mean) / (len(part) + n0) for part in rows]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", FAMILIES)
def test_outputs_while_recording_are_the_eager_ones(kind: str) -> None:
    model, ids = made(kind), text()[0]
    names = expert_parameters(model)
    assert names.keys() <= dict(model.named_parameters()).keys()
    before = model.config._experts_implementation
    with torch.no_grad():
        model.config._experts_implementation = "eager"
        eager = model(ids).logits
        model.config._experts_implementation = before
        with InputCapture(expert_inputs(names, "each")) as capture:
            recorded = model(ids).logits
    assert (recorded - eager).abs().max() <= 1e-6 * eager.abs().max()
    assert len(capture.covariances()) > len(capture.modules) - 2 * E
    assert model.config._experts_implementation == before
    assert not any("corda" in function for function in ALL_EXPERTS_FUNCTIONS)


@pytest.mark.filterwarnings("ignore:no token was routed")
@pytest.mark.parametrize("mode", ["shared", "each"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_experts_covariance_is_that_of_its_tokens(kind: str, mode: Any) -> None:
    model, batches = made(kind).double(), text()
    found = calibrate(model, batches, experts=mode, progress=False)
    for name, rows in rows_read(model, batches).items():
        if mode == "shared" and not name.endswith("down_proj"):
            pooled = torch.cat(rows)  # each token as often as it is routed, which changes nothing
            assert distance(found[name].matrix, pooled.T @ pooled / len(pooled)) < 1e-10
            continue
        assert name not in found
        for e, exact in enumerate(expected(rows)):
            covariance = found[f"{name}.{e}"]
            assert covariance.tokens == len(rows[e])
            assert distance(covariance.matrix, exact) < 1e-10, (name, e)
            assert torch.equal(covariance.matrix, covariance.matrix.T)
            if len(rows[e]):
                torch.testing.assert_close(
                    covariance.absmax.double(), rows[e].abs().amax(0), rtol=1e-4, atol=1e-6
                )


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_tokens_that_a_mask_leaves_out_count_for_no_expert(kind: str) -> None:
    model, ids = made(kind), text()[0]
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    names = {n: p for n, p in expert_parameters(model).items() if ".layers.0." in n}
    capture = InputCapture(expert_inputs(names, "shared"))
    capture.begin_rows(mask)
    with capture, torch.no_grad():
        model(ids)
    first, *own = capture.covariances().values()
    routed = 2 * int(mask.sum())
    assert sum(part.tokens for part in own) == routed
    assert first.tokens == (routed if kind == "llama4_text" else routed // 2)


@pytest.mark.filterwarnings("ignore:no token was routed")
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_offloaded_experts_give_the_same_bits(kind: str) -> None:
    model, batches = made(kind), text()
    expected = calibrate(model, batches, experts="each", progress=False)
    cpu_offload(model.model.layers, execution_device="cpu")
    blocks = calibrate_blocks(model, batches, experts="each", progress=False)
    found = {name: covariance for block in blocks for name, covariance in block.items()}
    assert found.keys() == expected.keys()
    for name, covariance in found.items():
        assert torch.equal(covariance.matrix, expected[name].matrix), name


def test_names_select_expert_parameters_and_refusals_say_why() -> None:
    model = made("qwen3_moe")
    linears, fused = target_layers(model, ["q_proj", "experts.down_proj"])
    assert {name.rpartition(".")[2] for name in linears} == {"q_proj"}
    assert list(fused) == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    assert not target_layers(model)[1]
    assert len(target_layers(model, experts=True)[1]) == 4
    assert len(target_layers(model, r".*\.1\.mlp\.experts\..*")[1]) == 2
    with pytest.raises(TargetError, match="select none of the model's fused experts"):
        target_layers(model, ["q_proj"], experts=True)
    with pytest.raises(TargetError, match="has no fused experts"):
        target_layers(nn.Sequential(nn.Linear(2, 2)), experts=True)


def test_whatever_happens_the_experts_function_is_put_back() -> None:
    model = made("gpt_oss")
    before = model.config._experts_implementation
    stop = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, text(), experts="shared", progress=False)
    assert model.config._experts_implementation == before
    assert not any("corda" in function for function in ALL_EXPERTS_FUNCTIONS)
    stop.remove()


class Squares(TorchDispatchMode):
    """Counts the bytes of (d, d) tensors that are alive beside a model, and the most there were."""

    def __init__(self, model: nn.Module, *widths: int) -> None:
        super().__init__()
        self.widths, self.most = widths, 0
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.shape in [(d, d) for d in self.widths]:
            storage = found.untyped_storage()
            self.alive = [entry for entry in self.alive if not entry[0].expired()]
            known = {entry[0].cdata for entry in self.alive} | self.weights
            if storage._cdata not in known:
                self.alive.append((StorageWeakRef(storage), storage.nbytes()))
            self.most = max(self.most, sum(size for _, size in self.alive))
        return found


MANY = {"num_experts": 64, "num_experts_per_tok": 4}


@pytest.fixture(scope="module")
def many() -> nn.Module:
    """Qwen3-MoE with 64 experts a layer, more than the text's tokens reach."""
    return made("qwen3_moe", **MANY)


def test_an_expert_without_tokens_has_the_mean_and_is_named(many: nn.Module) -> None:
    batches = text()
    with pytest.warns(
        CordaWarning, match=r"no token was routed to .*\.mlp\.experts\.down_proj\.\d"
    ):
        found = calibrate(many, batches, experts="shared", progress=False)
    rows = rows_read(many, batches)["model.layers.1.mlp.experts.down_proj"]
    together = torch.cat(rows)
    mean = together.T @ together / len(together)
    unseen = set()
    for e, x in enumerate(rows):
        covariance = found[f"model.layers.1.mlp.experts.down_proj.{e}"]
        assert covariance.tokens == len(x)
        if not len(x):
            unseen.add(covariance)
            assert distance(covariance.matrix, mean) < 1e-5
    assert len(unseen) == 1  # all of them share it
    never = copy.deepcopy(many)
    never.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(
        CalibrationError, match=r"65 target .*layers\.1\.mlp\.experts\.gate_up_proj,"
    ):
        calibrate(never, batches, experts="shared", progress=False)


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_the_most_that_is_held_block_by_block_is_one_layer(many: nn.Module) -> None:
    batches, options = text(), {"experts": "shared", "progress": False}
    with Squares(many, 24, 32) as held:
        whole = calibrate(many, batches, **options)
    sizes = [4 * len(covariance.matrix) ** 2 for covariance, _ in whole.groups()]
    assert held.most >= sum(sizes)
    blocks = []
    with Squares(many, 24, 32) as held:
        for block in calibrate_blocks(many, batches, **options):
            blocks.append(sum(4 * len(covariance.matrix) ** 2 for covariance, _ in block.groups()))
            del block
    assert sum(blocks) == sum(sizes)
    assert max(blocks) <= held.most <= max(blocks) + 4 * 32**2  # what a kernel makes on the way


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_block_by_block_holds_one_layer_and_resumes_to_the_same_bits(
    many: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_TOGETHER", {False: 0})  # a checkpoint after each batch
    batches = text()
    options: dict[str, Any] = {"experts": "shared", "progress": False}
    whole = calibrate(many, batches, **options)
    matrices: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def count(*_: Any) -> None:
        gc.collect()
        held.append(sum(ref() is not None for ref in matrices))

    watched = many.model.layers[1].register_forward_pre_hook(count)
    for block in calibrate_blocks(many, batches, **options):  # enumerate would hold a block
        index = next(iter(block)).split(".")[2]
        matrices += [weakref.ref(covariance.matrix) for covariance in block.values()]
        assert list(block) == [name for name in whole if name.startswith(f"model.layers.{index}.")]
        for name, covariance in block.items():
            assert torch.equal(covariance.matrix, whole[name].matrix), name
            assert covariance.tokens == whole[name].tokens
        block.save(tmp_path / f"block-{index}")
        del block, covariance
    watched.remove()
    assert max(held) == 0  # of the blocks before, while the last one runs
    assert len(matrices) == len(whole)

    checkpoint = CalibrationCheckpoint(tmp_path / "kept", every=1, resume=True)
    kill = many.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(calibrate_blocks(many, batches, checkpoint=checkpoint, **options))
    kill.remove()
    assert len(checkpoint.kept()) == 1
    blocks = calibrate_blocks(many, batches, checkpoint=checkpoint, **options)
    for number, block in enumerate(blocks):
        block.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / f"block-{number}").read_bytes()

    def die_late(_: nn.Module, args: tuple[Tensor]) -> None:
        if args[0].shape[1] == batches[2].shape[1]:
            raise ZeroDivisionError

    one_pass = CalibrationCheckpoint(tmp_path / "pass", every=1, resume=True)
    kill = many.model.layers[1].mlp.register_forward_pre_hook(die_late)
    with pytest.raises(ZeroDivisionError):
        calibrate(many, batches, checkpoint=one_pass, **options)
    kill.remove()
    assert one_pass.kept()
    calibrate(many, batches, checkpoint=one_pass, **options).save(tmp_path / "resumed")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.filterwarnings("ignore:no token was routed")
def test_halves_are_summed_up_and_linear_layers_judged(many: nn.Module) -> None:
    plan = CalibrationPlan(experts="shared", stability=True, rank=4, progress=False)
    batches = text(4)
    (found,) = covariance_stages(many, batches, plan)
    whole = calibrate(many, batches, experts="shared", progress=False)
    assert list(found) == list(whole)
    judged = found.provenance["stability"]["layers"]
    assert judged.keys() == {name for name in found if "experts" not in name}
    assert [part.tokens for part in found.values()] == [part.tokens for part in whole.values()]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert distance(found[name].matrix, whole[name].matrix.double()) < 1e-5
