"""Models other than causal language models: classifiers, vision, speech, encoder–decoders.

Each is calibrated on what it takes, adapted, trained, saved, loaded and exported.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor, nn

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    calibrate,
    export_lora,
    init_corda,
    load_for_training,
    save_adapter,
)
from corda_kernels.calibration import CalibrationCheckpoint, calibrate_blocks
from corda_kernels.calibration.needs import calibration_needs
from corda_kernels.errors import (
    CalibrationError,
    ConfigError,
    LeftOutWarning,
    ModelError,
    PaddingWarning,
    RankError,
    TargetError,
)
from corda_kernels.init import corda_adapter
from corda_kernels.structure import task_type
from corda_kernels.targets import target_linears

Batch = dict[str, Any]
Case = tuple[nn.Module, Batch, Callable[[str], Tensor | None], str | None]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = SIZES | {"vocab_size": 60, "pad_token_id": 0}
TWO = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = tf.T5Config(
    vocab_size=60,
    d_model=32,
    d_kv=16,
    d_ff=40,
    num_layers=1,
    num_heads=2,
    pad_token_id=0,
    decoder_start_token_id=0,
)
IMAGE = SIZES | {"image_size": 32, "patch_size": 16}  # 4 patches and a class token
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
IGNORED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def ids(*shape: int) -> Tensor:
    return torch.randint(5, 50, shape)


def text() -> Batch:
    return {"input_ids": ids(3, 5) * MASK, "attention_mask": MASK}


def labels() -> Tensor:
    return ids(3, 5).masked_fill(IGNORED == 0, -100)


def all_text(name: str) -> Tensor | None:
    return None if "pooler" in name else MASK


def nothing(name: str) -> None:
    return None


def in_pairs(name: str) -> Tensor | None:
    """The encoder's mask, which layers of the decoder that read the encoder's states share."""
    crossing = re.search(r"(EncDecAttention|encoder_attn)\.[kv]", name)
    return MASK if ".encoder." in f".{name}" or crossing else IGNORED


def speech(name: str) -> Tensor | None:
    return None if in_pairs(name) is MASK else IGNORED


def beside_images(name: str) -> Tensor | None:
    return MASK if "text_model." in name else None


def bert_classifier() -> Case:
    model = tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3))
    batch = text() | {"token_type_ids": MASK, "labels": torch.tensor([0, 1, 2])}
    return model, batch, all_text, "SEQ_CLS"


def bert_tagger() -> Case:
    model = tf.BertForTokenClassification(tf.BertConfig(**TEXT, num_labels=3))
    return model, text() | {"labels": labels() % 3}, all_text, "TOKEN_CLS"


def bert_filler() -> Case:
    return tf.BertForMaskedLM(tf.BertConfig(**TEXT)), text() | {"labels": labels()}, all_text, None


def distilbert_classifier() -> Case:
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 40, "vocab_size": 60}
    model = tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**sizes, num_labels=3))
    return model, text() | {"labels": torch.tensor([0, 1, 2])}, all_text, "SEQ_CLS"


def llama_classifier() -> Case:
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**TEXT, num_labels=3))
    return model, text() | {"labels": torch.tensor([0, 1, 2])}, all_text, "SEQ_CLS"


def llama_packed() -> Case:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    # With a cache transformers does not keep packed texts apart.
    batch = {"input_ids": ids(2, 5), "position_ids": positions, "use_cache": False}
    return model, batch, nothing, "CAUSAL_LM"


def llama_base() -> Case:
    return tf.LlamaModel(tf.LlamaConfig(**TEXT)), text(), all_text, "FEATURE_EXTRACTION"


def vit_classifier() -> Case:
    model = tf.ViTForImageClassification(tf.ViTConfig(**IMAGE, num_labels=3))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}
    return model, batch, nothing, None


def clip() -> Case:
    config = tf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)
    batch = text() | {"pixel_values": torch.randn(3, 3, 32, 32)}  # as many patches as tokens
    return tf.CLIPModel(config), batch, beside_images, None


def siglip() -> Case:
    config = tf.SiglipConfig(text_config=TEXT, vision_config=IMAGE)
    batch = {"input_ids": ids(3, 5), "pixel_values": torch.randn(3, 3, 32, 32)}
    return tf.SiglipModel(config), batch, nothing, None


def t5() -> Case:
    model = tf.T5ForConditionalGeneration(T5)
    return model, text() | {"labels": labels()}, in_pairs, "SEQ_2_SEQ_LM"


def bart() -> Case:
    model = tf.BartForConditionalGeneration(tf.BartConfig(**TWO))
    return model, text() | {"labels": labels()}, in_pairs, "SEQ_2_SEQ_LM"


def bart_masked() -> Case:
    model = tf.BartForConditionalGeneration(tf.BartConfig(**TWO))
    read = {"decoder_input_ids": ids(3, 5), "decoder_attention_mask": IGNORED}
    return model, text() | read, in_pairs, "SEQ_2_SEQ_LM"


def bart_alone() -> Case:
    model = tf.BartForConditionalGeneration(tf.BartConfig(**TWO))
    return model, text(), lambda name: MASK, "SEQ_2_SEQ_LM"


def whisper() -> Case:
    config = tf.WhisperConfig(
        **TWO, num_mel_bins=8, max_source_positions=5, max_target_positions=16
    )
    batch = {"input_features": torch.randn(3, 8, 10), "labels": labels()}
    return tf.WhisperForConditionalGeneration(config), batch, speech, None


def llava() -> Case:
    config = tf.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=IMAGE | {"model_type": "clip_vision_model"},
        image_token_index=59,
    )
    batch = text()
    batch["input_ids"] = torch.cat([torch.full((3, 4), 59), batch["input_ids"]], 1)
    batch["attention_mask"] = mask = torch.cat([torch.ones(3, 4).long(), MASK], 1)
    batch |= {"pixel_values": 5 * torch.randn(3, 3, 32, 32), "labels": batch["input_ids"]}
    seen = lambda name: mask if "language_model" in name else None  # noqa: E731
    return tf.LlavaForConditionalGeneration(config), batch, seen, "CAUSAL_LM"


def qwen_vl() -> Case:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    config = tf.Qwen2VLConfig(
        text_config=TEXT
        | {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config=vision | {"temporal_patch_size": 2, "spatial_merge_size": 2},
        image_token_id=59,
        vision_start_token_id=58,
        vision_end_token_id=57,
    )
    row, mask = torch.tensor([58, 59, 59, 57]), torch.cat([torch.ones(3, 4).long(), MASK], 1)
    batch = {
        "input_ids": torch.cat([row.expand(3, 4), ids(3, 5) * MASK], 1),
        "attention_mask": mask,
        "pixel_values": 5 * torch.randn(24, 3 * 2 * 4 * 4),  # 2 × 4 patches an image, merged by 4
        "image_grid_thw": torch.tensor([[1, 2, 4]] * 3),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == 59).long()
    seen = lambda name: mask if "language_model" in name else None  # noqa: E731
    return tf.Qwen2VLForConditionalGeneration(config), batch, seen, "CAUSAL_LM"


ADAPTED = [
    bert_classifier,
    distilbert_classifier,
    bert_filler,
    llama_classifier,
    vit_classifier,
    clip,
    t5,
    bart,
    whisper,
    llava,
    qwen_vl,
]
CASES = [*ADAPTED, siglip, bert_tagger, llama_packed, llama_base, bart_masked, bart_alone]


def made(case: Callable[[], Case]) -> Case:
    model, *rest = case()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.double().eval(), *rest


@torch.no_grad()
def rows_read(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What each linear layer reads in `model(**batch)`, (..., in), by hooks of our own."""
    read: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: read.setdefault(name, []).append(args[0].detach().clone())

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    in_double(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(calls).squeeze(0) for name, calls in read.items()}


def in_double(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    given = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
        if value is not None
    }
    return model(**given)


def check(
    found: CovarianceSet, read: dict[str, Tensor], kept: Callable[[str], Tensor | None]
) -> None:
    for name, covariance in found.items():
        mask, x = kept(name), read[name]
        x = x.flatten(0, -2) if mask is None else x[mask.bool()]
        assert covariance.tokens == len(x), name
        expected = sum(torch.outer(row, row) for row in x) / len(x)
        error = (covariance.matrix.double() - expected).norm() / expected.norm()
        assert error < 1e-6, (name, error)


def output(model: nn.Module, batch: Batch) -> Tensor:
    given = in_double(model, batch)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in given:
            return given[name]
    raise AssertionError(given.keys())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_covariances_are_those_of_what_layers_read(case: Callable[[], Case]) -> None:
    model, batch, kept, task = made(case)
    before = copy.deepcopy(model.config.to_dict())
    found = calibrate(model, [batch], targets="all-linear", progress=False)
    assert model.config.to_dict() == before
    read = rows_read(model, batch)
    heads = ("lm_head", "classifier", "score", "cls.predictions.decoder", "proj_out")
    assert found.keys() == {name for name in read if not name.endswith(heads)}
    check(found, read, kept)
    assert task_type(model) == task


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.RankDeficientWarning")
@pytest.mark.parametrize("case", ADAPTED, ids=lambda case: case.__name__)
def test_any_model_is_adapted_trained_saved_loaded_and_exported(
    case: Callable[[], Case], tmp_path: Path
) -> None:
    base, batch, _, task = made(case)
    expected = output(base, batch).detach()
    config = CordaConfig("ipm", rank=2, targets="all-linear", progress=False)
    model: Any = init_corda(copy.deepcopy(base), [batch], config)
    assert model.peft_config["default"].task_type == task
    torch.testing.assert_close(output(model, batch).detach(), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = {name.split(".")[2] for name in trained if "lora" not in name}
    heads = ("classifier", "score")
    assert whole == {name for name, _ in base.named_children() if name.endswith(heads)}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    output(model, batch).sum().backward()
    optimizer.step()
    changed = output(model, batch).detach()
    assert (changed - expected).abs().max() > 1e-5
    save_adapter(model, tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    for load, folder in ((load_for_training, "adapter"), (PeftModel.from_pretrained, "lora")):
        loaded = load(copy.deepcopy(base), tmp_path / folder).double().eval()
        torch.testing.assert_close(output(loaded, batch).detach(), changed, rtol=1e-5, atol=1e-6)


def test_the_language_model_alone_is_adapted_by_default() -> None:
    model, batch, kept, _ = made(llava)
    every, default = target_linears(model, "all-linear"), target_linears(model)
    assert {name for name in every if ".language_model." in name} == default.keys() < every.keys()
    found = calibrate(model, [batch], progress=False)
    assert found.keys() == default.keys()
    check(found, rows_read(model, batch), kept)
    for case in (clip, bert_classifier, whisper):
        model, *_ = made(case)
        assert target_linears(model).keys() == target_linears(model, "all-linear").keys()


@pytest.mark.parametrize("case", [bart, clip, llama_classifier], ids=lambda case: case.__name__)
def test_a_function_may_run_the_model(case: Callable[[], Case]) -> None:
    model, batch, *_ = made(case)

    def run_model() -> None:
        for _ in range(2):
            in_double(model, batch)

    found = calibrate(model, run_model, progress=False)
    once = calibrate(model, [batch], progress=False)
    assert [names for _, names in found.groups()] == [names for _, names in once.groups()]
    for name, each in once.items():
        assert (found[name].tokens, found[name].calls) == (2 * each.tokens, 2)
        torch.testing.assert_close(found[name].matrix, each.matrix)
    with pytest.raises(ConfigError, match="neither shared out over ranks nor resumed"):
        calibrate(model, run_model, checkpoint=CalibrationCheckpoint("none"))


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        (llama_classifier, {"pixel_values": torch.ones(1)}, "pixel_values, which LlamaForSeq"),
        (vit_classifier, {"input_ids": torch.ones(1, 2).long()}, "input_ids, which ViTForImage"),
        (
            t5,
            {"labels": None},
            "run by T5ForCond.*: give all .* such as labels or decoder_input_ids",
        ),
        (bart, {"attention_mask": torch.zeros(3, 1, 5, 5)}, r"another shape than \(batch, seq\)"),
        (bart, {"attention_mask": torch.full((3, 5), -1e9)}, "other values than 1 .* and 0"),
        (llava, {"input_ids": torch.full((3, 9), 60)}, "holds token 60"),
    ],
)
def test_what_the_model_does_not_take_is_refused_by_name(
    case: Callable[[], Case], change: Batch, says: str
) -> None:
    model, batch, *_ = made(case)
    with pytest.raises(CalibrationError, match=f"batch 1 .*{says}"):
        calibrate(model, [batch, batch | change], progress=False)


def test_padding_of_a_decoder_without_a_mask_is_warned_about() -> None:
    model, batch, *_ = made(bart_masked)
    batch["decoder_input_ids"] *= IGNORED
    del batch["decoder_attention_mask"]
    with pytest.warns(PaddingWarning, match="give decoder_input_ids and decoder_attention_mask"):
        calibrate(model, [batch], progress=False)


@pytest.mark.parametrize("case", [t5, bart, whisper], ids=lambda case: case.__name__)
def test_encoder_decoders_are_refused_block_by_block(case: Callable[[], Case]) -> None:
    model, batch, *_ = made(case)
    with pytest.raises(CalibrationError, match="block by block, because its decoder's blocks read"):
        list(calibrate_blocks(model, [batch], progress=False))


def test_images_pass_through_block_by_block_without_padding() -> None:
    model, batch, *_ = made(llava)
    with pytest.raises(CalibrationError, match="because text beside other inputs is padded"):
        list(calibrate_blocks(model, [batch], progress=False))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    blocks = list(calibrate_blocks(model, [batch], progress=False))
    for name, whole in calibrate(model, [batch], progress=False).items():
        torch.testing.assert_close(blocks[0][name].matrix, whole.matrix)


def test_what_calibrating_needs_is_known_for_token_ids() -> None:
    with torch.device("meta"):
        pair, image = tf.T5ForConditionalGeneration(T5), tf.ViTModel(tf.ViTConfig(**IMAGE))
    needs = calibration_needs(pair.eval(), seq_len=4)
    assert needs.obstacle == "the model is an encoder–decoder"
    assert {name for _, names in needs.groups for name in names} == target_linears(pair).keys()
    with pytest.raises(
        ModelError, match="known only for models of token ids, and ViTModel takes pixel"
    ):
        calibration_needs(image.eval())


class Router(nn.Linear):
    """A layer that returns more than its product."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Gated(nn.Module):
    """A layer beside a gate of one row and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.up, self.gate, self.router = nn.Linear(32, 32), nn.Linear(32, 1), Router(32, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.up(x) * self.gate(x) + self.router(x)[0].sum(-1, keepdim=True)


def test_layers_too_small_for_the_rank_are_left_out_and_routers_are_no_targets() -> None:
    model, batches = Gated(), [ids(8, 9)]
    start = model(batches[0]).detach()
    config = CordaConfig("ipm", rank=2, progress=False)
    with pytest.warns(LeftOutWarning, match="for one gate: it is 1 × 32, too small for rank 2$"):
        adapted: Any = init_corda(copy.deepcopy(model), batches, config)
    assert list(adapted.corda_record.layers) == ["up"]
    torch.testing.assert_close(adapted(batches[0]).detach(), start)
    for targets, rank in ((["gate"], 2), (None, 33)):
        config = CordaConfig("ipm", rank=rank, targets=targets, progress=False)
        with pytest.raises(RankError, match=f"rank {rank} is not possible for layer"):
            init_corda(model, batches, config)
    with pytest.raises(TargetError, match="no linear layer matches"):
        target_linears(model, ["router"])


class Nested(nn.Module):
    """A layer whose name another one ends in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.proj = nn.Embedding(60, 16), nn.Linear(16, 16)
        self.block = nn.ModuleDict({"proj": nn.Linear(16, 16)})

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.proj(self.embedding(input_ids))


def test_a_layer_that_is_left_out_is_not_calibrated_by_the_end_of_its_name() -> None:
    config = CordaConfig("kpm", rank=2, exclude_modules=["block.proj"], progress=False)
    record = corda_adapter(Nested(), [ids(4, 9)], config).record
    assert list(record.layers) == ["proj"]
