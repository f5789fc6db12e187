from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2Config, dynamic_module_utils

from corda_kernels.errors import CordaWarning, ModelError, OutputError, TargetError
from corda_kernels.linears import is_linear, linear_weight
from corda_kernels.models import load_model, load_skeleton, load_tokenizer, save_model
from corda_kernels.structure import check_unwrapped, decoder, output_head
from corda_kernels.targets import target_linears, unreached_weights


@pytest.fixture
def llama(tiny_model: Make) -> nn.Module:
    return tiny_model("llama")


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "one": 1, "two": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_folder_without_a_tokenizer_is_written_and_named(
    tiny_model: Make, tmp_path: Path, architecture: str
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="plain has no tokenizer: copy the tokenizer's files"):
        load_tokenizer(tmp_path / "plain")
    with pytest.warns(CordaWarning, match="saved gets no tokenizer: .*plain has no tokenizer"):
        save_model(model, tmp_path / "saved", source=tmp_path / "plain")
    assert same_weights(load_model(tmp_path / "saved"), model)


@pytest.mark.parametrize("shards", [("20KB", "1GB"), ("1GB", "20KB")], ids=["fewer", "more"])
def test_a_saved_model_replaces_one_in_other_pieces(
    llama: nn.Module, tmp_path: Path, shards: tuple[str, str]
) -> None:
    before, after = shards
    save_tokenizer(tmp_path)
    zeros = copy.deepcopy(llama)
    for parameter in zeros.parameters():
        parameter.data.zero_()
    zeros.save_pretrained(tmp_path, max_shard_size=before)
    (tmp_path / "notes.txt").touch()
    llama.save_pretrained = functools.partial(llama.save_pretrained, max_shard_size=after)
    save_model(llama, tmp_path, source=tmp_path)
    assert same_weights(load_model(tmp_path), llama)
    load_tokenizer(tmp_path)
    assert (tmp_path / "notes.txt").is_file()


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_fills_up_leaves_no_half_model(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    source, path = tmp_path / "source", tmp_path / "path"
    save_tokenizer(source)
    llama.save_pretrained(source)
    if exists:
        save_model(llama, path, source=source)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OutputError, match=r"cannot write the model to .*No space left on device"):
        save_model(llama, path, source=source)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert path.exists() == exists


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_saved_model_is_loaded_as_it_was(
    tiny_model: Make, tmp_path: Path, architecture: str
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        found = load_model(source)
        assert same_weights(found, model)
        assert not any(module.training for module in found.modules())


def test_a_checkpoint_that_lacks_weights_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lacking = r"lacks 1 weights of LlamaForCausalLM, .* \(model\.layers\.1\.mlp\.up_proj\.weight\)"
    with pytest.raises(ModelError, match=lacking):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_asked_for(
    llama: nn.Module, tmp_path: Path, asked: Any, given: torch.dtype
) -> None:
    llama.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path, dtype=asked).parameters()} == {given}


def test_a_saved_tokenizer_is_loaded(llama: nn.Module, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path)("two one three")["input_ids"] == [2, 1, 0]


def test_a_gguf_file_is_loaded_dequantised(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    weights = {
        "token_embd.weight": torch.randn(64, 32),
        "blk.0.ffn_gate.weight": torch.randn(48, 32),
        "blk.0.ffn_up.weight": torch.randn(48, 32),
        "blk.0.ffn_down.weight": torch.randn(32, 48),
        "blk.0.attn_q.weight": torch.randn(32, 32),
        "blk.0.attn_k.weight": torch.randn(32, 32),
        "blk.0.attn_v.weight": torch.randn(32, 32),
        "blk.0.attn_output.weight": torch.randn(32, 32),
        "blk.0.attn_norm.weight": torch.ones(32),
        "blk.0.ffn_norm.weight": torch.ones(32),
        "output_norm.weight": torch.ones(32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    for name, weight in weights.items():
        writer.add_tensor(name, weight.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = load_model(path)

    assert {p.dtype for p in model.parameters()} == {torch.float32}
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert torch.equal(down, weights["blk.0.ffn_down.weight"].half().float())
    assert model.name_or_path == str(path)
    model.save_pretrained(tmp_path / "saved")
    assert same_weights(load_model(tmp_path / "saved"), model)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing/folder/of/a/model", "no such model folder or file"),
        ("./missing", "no such model folder or file"),
        ("missing.gguf", "no such model folder or file"),
        ("empty", "has no config.json: it is not the folder of a transformers model"),
        ("weights.bin", "is a file, but not a GGUF file"),
        ("text.gguf", "cannot load text.gguf"),
        ("zero.gguf", "cannot load zero.gguf"),
        ("broken", "cannot load broken"),
        ("bare", "cannot load bare"),
        ("damaged", "cannot load damaged"),
        ("invalid", "cannot load invalid: .*not a multiple of the number of attention heads"),
        ("nobody/nothing", "cannot load nobody/nothing: .*needs network access or a filled cache"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(
    load: Callable[..., Any],
    source: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    configs = {
        "broken": "{",
        "bare": json.dumps(config | {"num_attention_heads": 2}),
        "damaged": json.dumps(config | {"num_attention_heads": 2}),
        "invalid": json.dumps(config | {"num_attention_heads": 3}),
    }
    (tmp_path / "empty").mkdir()
    for folder, text in configs.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
        (tmp_path / folder / "tokenizer.json").write_text("{")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"123")
    (tmp_path / "weights.bin").write_bytes(b"123")
    (tmp_path / "text.gguf").write_bytes(b"not GGUF" * 100)
    (tmp_path / "zero.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_or_device_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="dtype 'int4' is not one of float32, bfloat16"):
        load_model(tmp_path, dtype="int4")
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ModelError, match=f"device '{device}'"):
            load_model(tmp_path, device=device)


@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "mixtral", "qwen3_moe"],
)
def test_the_decoder_computes_no_logits(tiny_model: Make, architecture: str) -> None:
    model = tiny_model(architecture)
    inner = decoder(model)
    assert inner is not model
    assert output_head(model) is model.lm_head
    assert model.lm_head not in set(inner.modules())
    assert inner(input_ids=torch.ones(1, 3).long())[0].shape == (1, 3, 32)


def test_a_plain_module_is_its_own_decoder_and_has_no_head() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert decoder(model) is model
    assert output_head(model) is None


def test_linear_weights_are_out_by_in_and_views() -> None:
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(3, 5), Conv1D(5, 3)  # both from 3 to 5 channels
    x = torch.randn(2, 3)
    for module in (linear, conv):
        assert is_linear(module)
        weight = linear_weight(module)
        assert weight.shape == (5, 3)
        assert weight.data_ptr() == module.weight.data_ptr()
        torch.testing.assert_close(module(x), x @ weight.T + module.bias)


@pytest.mark.parametrize("module", [nn.Embedding(3, 3), nn.LayerNorm(3), nn.Conv1d(3, 3, 1)])
def test_other_layers_are_not_linear(module: nn.Module) -> None:
    assert not is_linear(module)


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 3, dtype=torch.int8), torch.zeros(9, 1, 1), torch.zeros(9)]
)
def test_a_packed_weight_is_refused(weight: torch.Tensor) -> None:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TargetError, match="class Linear holds a packed weight"):
        linear_weight(layer)


PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]),
        (["q_proj"], [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]),
        (["mlp.up_proj"], [f"model.layers.{i}.mlp.up_proj" for i in range(2)]),
        (("1.mlp.up_proj", "1.mlp.up_proj"), ["model.layers.1.mlp.up_proj"]),
        (["model.layers.0.self_attn.v_proj"], ["model.layers.0.self_attn.v_proj"]),
        (
            ["v_proj", "q_proj"],
            [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"],
        ),
        (
            r".*layers\.1\..*(gate|up)_proj",
            [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")],
        ),
        (r"lm_.*", ["lm_head"]),
    ],
)
def test_targets_select_layers_in_the_models_order(
    llama: nn.Module, targets: Any, expected: list[str]
) -> None:
    found = target_linears(llama, targets)
    assert list(found) == expected
    assert all(found[name] is llama.get_submodule(name) for name in expected)


@pytest.mark.parametrize(
    "targets", [["proj"], ["_proj"], [], "q_proj", "model", ["embed_tokens"], ["q_proj", "v_porj"]]
)
def test_targets_that_match_nothing_are_told_what_there_is(llama: nn.Module, targets: Any) -> None:
    endings = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(TargetError, match=f"end in: {endings}$"):
        target_linears(llama, targets)


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", ["up_proj", "lm_head"], PROJECTIONS[:5] + PROJECTIONS[6:]),
        ("all-linear", ("self_attn.q_proj", "mlp.down_proj"), PROJECTIONS[1:6]),
        ("all-linear", r".*\.mlp\..*", PROJECTIONS[:4]),
        (["q_proj", "v_proj"], ["v_proj"], PROJECTIONS[:1]),
        (r".*\.[qk]_proj", ["v_proj"], PROJECTIONS[:2]),
        ("all-linear", [], PROJECTIONS),
        ("all-linear", None, PROJECTIONS),
    ],
)
def test_excluded_layers_are_left_out(
    llama: nn.Module, targets: Any, exclude: Any, expected: list[str]
) -> None:
    found = target_linears(llama, targets, exclude)
    assert list(found) == [f"model.layers.{i}.{name}" for i in range(2) for name in expected]


def test_one_layer_can_be_excluded(llama: nn.Module) -> None:
    found = target_linears(llama, ["q_proj"], ["model.layers.0.self_attn.q_proj"])
    assert list(found) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("exclude", [["proj"], "q_proj", ["q_proj", "v_porj"], ["embed_tokens"]])
def test_an_exclusion_that_matches_nothing_is_told_what_there_is(
    llama: nn.Module, exclude: Any
) -> None:
    unmatched = exclude if isinstance(exclude, str) else exclude[-1:]
    with pytest.raises(TargetError) as caught:
        target_linears(llama, exclude=exclude)
    text = str(caught.value)
    assert text.startswith(f"no linear layer matches exclude {unmatched!r}; ")
    assert text.endswith(
        "end in: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


def test_an_exclusion_of_everything_is_refused(llama: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"exclude '\.\*' leaves no layer of the targets"):
        target_linears(llama, exclude=".*")
    with pytest.raises(TargetError, match="leaves no layer of the targets"):
        target_linears(llama, ["q_proj"], ["q_proj", "v_proj"])


def test_a_tied_head_can_be_excluded_from_targets_that_match_it(tiny_model: Make) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    found = target_linears(model, ".*(up_proj|lm_head)", ["lm_head"])
    assert [name.rpartition(".")[2] for name in found] == ["up_proj"] * 2


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [(functools.partial(torch.compile, backend="eager"), "_orig_mod"), (nn.DataParallel, "module")],
    ids=["compile", "data parallel"],
)
def test_a_wrapped_model_is_refused_with_where_the_model_is(
    llama: nn.Module, wrap: Callable[[nn.Module], nn.Module], inside: str
) -> None:
    wrapped = wrap(llama)
    kind = type(wrapped).__name__
    with pytest.raises(ModelError, match=rf"wrapped in {kind}: .* \(model\.{inside}\) first"):
        check_unwrapped(wrapped)
    assert getattr(wrapped, inside) is llama
    check_unwrapped(llama)


def test_a_model_without_linear_layers_says_so() -> None:
    with pytest.raises(TargetError, match=r"\(it has none\)"):
        target_linears(nn.Sequential(nn.Embedding(3, 3)))


def test_a_broken_regular_expression_is_named(llama: nn.Module) -> None:
    for given in ({"targets": "(q"}, {"exclude": "(q"}):
        with pytest.raises(TargetError, match=r"^'\(q' is not a regular expression"):
            target_linears(llama, **given)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_tied_head_is_refused(tiny_model: Make, architecture: str) -> None:
    model = tiny_model(architecture, tie_word_embeddings=True)
    assert "lm_head" not in target_linears(model)
    with pytest.raises(TargetError, match=r"lm_head shares its weight with \S+: adapting it"):
        target_linears(model, ["lm_head"])
    untied = tiny_model(architecture, tie_word_embeddings=False)
    assert list(target_linears(untied, ["lm_head"])) == ["lm_head"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_dense_models_have_no_weight_out_of_reach(tiny_model: Make, architecture: str) -> None:
    assert unreached_weights(tiny_model(architecture)) == {}


def test_a_class_token_is_no_expert() -> None:
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(1, 1, 8))
    model.place = nn.Parameter(torch.zeros(1, 5, 8))
    model.linear = nn.Linear(8, 8)
    assert unreached_weights(model) == {}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_fused_experts_come_first_among_the_weights_out_of_reach(
    tiny_model: Make, architecture: str
) -> None:
    model = tiny_model(architecture)
    reasons = unreached_weights(model)
    ranks = [model.get_parameter(name).ndim for name in reasons]
    assert ranks == [3, 3, 3, 3, 2, 2]
    assert all("4 experts fused" in reason for reason in list(reasons.values())[:4])


def test_weights_that_a_state_space_mixers_kernels_take_are_no_targets_unless_named() -> None:
    config = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, n_groups=1, num_hidden_layers=1, vocab_size=60
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    taken = "backbone.layers.0.mixer.out_proj"
    assert list(target_linears(model)) == ["backbone.layers.0.mixer.in_proj"]
    assert "past an adapter" in unreached_weights(model)[f"{taken}.weight"]
    assert list(target_linears(model, ["out_proj"])) == [taken]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open({mark!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("load", [load_model, load_skeleton, load_tokenizer])
def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, mark = tmp_path / "model", tmp_path / "ran"
    llama.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    for name, changes in {
        "config.json": {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        },
    }.items():
        described = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"model needs Python code .*\(--trust-remote-code\)"):
        load(folder)
    assert not mark.exists()
    assert type(load(folder, trust_remote_code=True)).__name__.startswith("Own")
    assert mark.exists()
