"""Tiny models of many types, and what each can do: the table that docs/models.md shows.

    python tests/families.py            # rewrites the table in docs/models.md

`test_families.py` holds every row of the table, and the page, to what happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from family_batches import (
    Batch,
    captioned,
    florence_seen,
    frames,
    heard,
    ids,
    images,
    noised,
    pair,
    qwen_seen,
    seen,
    spectra,
    text,
    typed,
    waves,
)
from family_sizes import (
    BEHIND,
    CLIP,
    DELTA,
    FLORENCE_VISION,
    GPT,
    IMAGE,
    LATENT,
    LLAMA,
    MAMBA,
    MLLAMA_VISION,
    ONE,
    OPT,
    PER_LAYER,
    PYRAMID,
    QWEN,
    QWEN2,
    QWEN3_VISION,
    QWEN_TEXT,
    QWEN_VISION,
    ROPE,
    ROUTED,
    SHARED,
    SIGLIP,
    SOUND,
    STAGES,
    SWIN,
    T5,
    TEXT,
    TWO,
    VISION,
    VOXTRAL,
    WAVE,
    E,
    Sizes,
)

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
# What a refusal says, by the mark that stands for it in the table.
REFUSALS = {
    "a": "block by block, because its decoder's blocks read the encoder's states too",
    "b": "lies outside of its blocks: leave that out of the targets",
    "c": "block by block, because something happens to the hidden states between its blocks",
    "d": "block by block, because its blocks change the shape of what they read",
    "e": "is known only for models of token ids",
    "f": "does not run without its weights",
    "g": "no linear layer matches targets 'all-linear'",
    "h": "by itself: give sequences of such a length",
}
ADAPTER, BLOCKS, PLAN = "adapter", "blocks", "plan"


@dataclass(frozen=True)
class Family:
    """A model type.

    Attributes:
        kind: transformers' name for it.
        model: the class, of transformers.
        batch: makes what the model takes.
        sizes: of its config.
        refused: marks of `REFUSALS` by what is refused; all else works.
    """

    kind: str
    model: str
    batch: Callable[[], Batch]
    sizes: Sizes = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"
PAIRS = "AutoModelForSeq2SeqLM"
IMAGE_CLASSIFIER = "AutoModelForImageClassification"
TRANSCRIBER = "AutoModelForCTC"
LOOKER = "AutoModelForImageTextToText"

OUTSIDE = {BLOCKS: "b"}
CROSSING = {BLOCKS: "a"}
NO_IDS = {PLAN: "e"}


def causal(kind: str, sizes: Sizes | None = None, refused: dict[str, str] | None = None) -> Family:
    return Family(kind, CAUSAL, text, TEXT | (sizes or {}), refused or {})


def encoder(kind: str, sizes: Sizes | None = None, refused: dict[str, str] | None = None) -> Family:
    return Family(kind, CLASSIFIER, text, TEXT | (sizes or {}), refused or {})


def pairs(kind: str, sizes: Sizes = TWO, refused: dict[str, str] | None = None) -> Family:
    return Family(kind, PAIRS, pair, sizes, CROSSING | (refused or {}))


def vision(kind: str, sizes: Sizes, refused: dict[str, str] | None = None) -> Family:
    return Family(kind, IMAGE_CLASSIFIER, images, sizes, NO_IDS | (refused or {}))


def speech(kind: str) -> Family:
    return Family(kind, TRANSCRIBER, waves, WAVE, NO_IDS | OUTSIDE)


def looking(
    kind: str,
    batch: Callable[[], Batch],
    text_config: Sizes,
    vision_config: Sizes,
    more: Sizes | None = None,
    refused: dict[str, str] | None = None,
) -> Family:
    parts = {"text_config": text_config, "vision_config": vision_config}
    tokens = {"image_token_index": 59} if "image_token_id" not in (more or {}) else {}
    return Family(kind, LOOKER, batch, parts | tokens | (more or {}), refused or {})


FAMILIES: list[Family] = [
    *map(causal, ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]),
    causal("gemma3n_text", PER_LAYER | {"altup_num_inputs": 2, "laurel_rank": 4}
        | {"activation_sparsity_pattern": [0.0, 0.0]}, OUTSIDE),
    causal("gemma4_text", PER_LAYER | {"global_head_dim": 8}, OUTSIDE),
    *(causal(kind, GPT) for kind in ("gpt2", "gptj")),
    causal("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    causal("gpt_neox"),
    causal("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    causal("bloom", {"n_layer": 2, "n_head": 4}),
    Family("falcon", CAUSAL, text, {n: v for n, v in TEXT.items() if n != "head_dim"}),
    causal("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    *map(causal, ["phi", "phi3", "stablelm", "starcoder2", "olmo", "olmo2", "olmo3", "granite"]),
    *map(causal, ["cohere", "cohere2", "glm", "glm4", "smollm3", "exaone4", "ernie4_5"]),
    *map(causal, ["hunyuan_v1_dense", "seed_oss", "nemotron"]),
    causal("mamba", {"state_size": 4}),
    causal("mamba2", {"state_size": 4, "num_heads": 8, "n_groups": 1, "chunk_size": 8}),
    causal("falcon_h1", MAMBA | {"mamba_d_ssm": 64}),
    causal("granitemoehybrid", MAMBA | ROUTED | {"layer_types": ["mamba", "attention"]}
        | {"shared_intermediate_size": 48}),
    causal("jamba", MAMBA | ROUTED | {"attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_dt_rank": 4, "use_mamba_kernels": False}),
    causal("zamba2", {"mamba_d_state": 4, "n_mamba_heads": 8, "mamba_headdim": 8}
        | {"mamba_ngroups": 1, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4}
        | {"use_mamba_kernels": False, "num_mem_blocks": 1, "attention_head_dim": 16}
        | {"num_key_value_heads": 4}),
    causal("nemotron_h", ROUTED | {"layers_block_type": ["mamba", "attention", "moe"]}
        | {"num_hidden_layers": 3, "moe_shared_expert_intermediate_size": 24}
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1}
        | {"chunk_size": 8}),
    causal("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    causal("qwen3_5_text", DELTA),
    causal("qwen3_next", SHARED | DELTA),
    causal("minimax", ROUTED | {"layer_types": ["linear_attention", "full_attention"]}
        | {"block_size": 8}),
    *(causal(kind, ROUTED) for kind in ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")),
    causal("minimax_m2", ROUTED),
    causal("qwen2_moe", SHARED),
    causal("deepseek_v2", ROUTED | LATENT | {"topk_method": "greedy"}),
    causal("deepseek_v3", ROUTED | LATENT),
    causal("glm4_moe", ROUTED | {"first_k_dense_replace": 1}),
    causal("llama4_text", ROUTED | {"intermediate_size_mlp": 48}),
    causal("ernie4_5_moe", ROUTED | {"moe_num_experts": E, "moe_k": 2, "moe_layer_start_index": 1}
        | {"moe_num_shared_experts": 1}),
    # Encoders, as classifiers of sequences.
    *(encoder(kind, {}, OUTSIDE) for kind in ("bert", "deberta-v2", "nomic_bert")),
    *(encoder(kind, BEHIND) for kind in ("roberta", "xlm-roberta", "mpnet")),
    encoder("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    encoder("electra", {"embedding_size": 16}, OUTSIDE),
    encoder("albert", {"embedding_size": 16}, OUTSIDE),
    encoder("modernbert", {"cls_token_id": 1, "sep_token_id": 2}, OUTSIDE),
    encoder("eurobert", {}, OUTSIDE),
    encoder("esm", {"position_embedding_type": "rotary", "mask_token_id": 4}, OUTSIDE),
    encoder("longformer", BEHIND | {"attention_window": 8}, {ADAPTER: "h", BLOCKS: "h", PLAN: "f"}),
    # Encoder–decoders.
    *(pairs(kind, T5) for kind in ("t5", "mt5", "longt5")),
    *map(pairs, ["bart", "mbart", "pegasus", "marian", "m2m_100"]),
    pairs("t5gemma", {"encoder": ONE, "decoder": ONE, "vocab_size": 60}),
    pairs("led", TWO | {"attention_window": 8, "max_encoder_position_embeddings": 64}
        | {"max_decoder_position_embeddings": 64}, {ADAPTER: "h", PLAN: "f"}),
    # Vision.
    *(vision(kind, IMAGE) for kind in ("vit", "beit", "dinov2")),
    Family("deit", "DeiTForImageClassification", images, IMAGE, NO_IDS),
    Family("dinov3_vit", "AutoModel", images, IMAGE, NO_IDS),
    Family("vit_mae", "ViTMAEForPreTraining", noised, IMAGE | {"decoder_num_attention_heads": 2}
        | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
        | {"decoder_intermediate_size": 32}, NO_IDS | OUTSIDE),
    vision("swin", SWIN, {BLOCKS: "d"}),
    vision("convnext", STAGES, {BLOCKS: "d"}),
    vision("segformer", PYRAMID),
    vision("resnet", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
        | {"num_labels": 3}, {ADAPTER: "g", BLOCKS: "g"}),
    # Text and images side by side.
    *(Family(kind, "AutoModel", captioned, {"text_config": TEXT, "vision_config": IMAGE}
        | {"projection_dim": 16}, {BLOCKS: "b", PLAN: "f"}) for kind in ("clip", "siglip")),
    Family("blip", "BlipForConditionalGeneration", captioned,
        {"text_config": TEXT | {"encoder_hidden_size": 32}, "vision_config": IMAGE}
        | {"projection_dim": 16, "image_text_hidden_size": 16}, {BLOCKS: "b", PLAN: "f"}),
    # Vision–language models.
    looking("llava", seen(4), LLAMA, CLIP),
    looking("llava_next", seen(10, (2, 2, 3, 16, 16), image_sizes=[16, 16]), LLAMA, CLIP,
        {"image_grid_pinpoints": [[16, 16]]}),
    looking("qwen2_vl", qwen_seen, QWEN_TEXT, QWEN_VISION, QWEN),
    looking("qwen2_5_vl", qwen_seen, QWEN_TEXT, QWEN3_VISION, QWEN),
    looking("qwen3_vl", qwen_seen, QWEN_TEXT, QWEN3_VISION, QWEN, {BLOCKS: "c"}),
    looking("qwen3_5", qwen_seen, TEXT | DELTA
        | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}, QWEN3_VISION, QWEN),
    looking("gemma3", typed(seen(4), "token_type_ids"), TEXT, SIGLIP, {"mm_tokens_per_image": 4}),
    looking("paligemma", typed(seen(4), "token_type_ids"), TEXT | {"model_type": "gemma"}, SIGLIP,
        {"projection_dim": 32}),
    *(looking(kind, seen(1, (2, 1, 3, 16, 16)), LLAMA, VISION,
        {"image_token_id": 59, "scale_factor": 2}) for kind in ("idefics3", "smolvlm")),
    looking("internvl", seen(1), QWEN2, VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
        {"image_token_id": 59}),
    looking("mistral3", seen(1, image_sizes=[16, 16]), TEXT | {"model_type": "mistral"},
        VISION | {"model_type": "pixtral", "head_dim": 8}, {"spatial_merge_size": 2}),
    looking("mllama", seen(1, (2, 1, 1, 3, 16, 16), aspect_ratio_ids=[1], aspect_ratio_mask=[[1]],
        cross_attention_mask=[[[1]]] * 9), TEXT | {"cross_attention_layers": [1]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, MLLAMA_VISION),
    looking("blip-2", seen(4), OPT, VISION, {"qformer_config": TEXT | {"encoder_hidden_size": 32}}
        | {"num_query_tokens": 4}, {PLAN: "f"}),
    looking("florence2", florence_seen, TWO | {"model_type": "bart"}, FLORENCE_VISION,
        {"image_token_id": 59}, CROSSING),
    # Speech.
    *map(speech, ["wav2vec2", "hubert"]),
    Family("wavlm", TRANSCRIBER, waves, WAVE, {BLOCKS: "b", PLAN: "e"}),
    Family("audio-spectrogram-transformer", "AutoModelForAudioClassification",
        lambda: {"input_values": torch.randn(3, 16, 8)}, IMAGE | {"patch_size": 4}
        | {"max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4}, NO_IDS),
    Family("whisper", "AutoModelForSpeechSeq2Seq", spectra, TWO, CROSSING | NO_IDS),
    Family("speech_to_text", "AutoModelForSpeechSeq2Seq", frames, TWO | {"conv_channels": 16}
        | {"input_feat_per_channel": 8, "num_conv_layers": 1, "conv_kernel_sizes": [3]}
        | {"max_source_positions": 64}, CROSSING | NO_IDS),
    Family("moonshine", "AutoModelForSpeechSeq2Seq",
        lambda: {"input_values": torch.randn(2, 3000), "labels": ids(2, 8)},
        TEXT | {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
        | {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}
        | {"decoder_start_token_id": 1}, CROSSING | NO_IDS),
    Family("qwen2_audio", "Qwen2AudioForConditionalGeneration",
        heard(10, feature_attention_mask=torch.ones(2, 40).long()),
        {"text_config": QWEN2, "audio_config": SOUND, "audio_token_index": 59}),
    Family("voxtral", "VoxtralForConditionalGeneration", heard(5),
        {"text_config": LLAMA, "audio_config": VOXTRAL}
        | {"audio_token_id": 59}),
]  # fmt: skip


def page_table() -> str:
    """The table in Markdown."""
    columns = ("adapter", "block by block", "plan")
    rows = ["| model type | class | " + " | ".join(columns) + " |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        marks = (family.refused.get(column, "✓") for column in (ADAPTER, BLOCKS, PLAN))
        rows.append(f"| {family.kind} | {family.model} | {' | '.join(marks)} |")
    said = {mark for family in FAMILIES for mark in family.refused.values()}
    reasons = [f"- {mark}: “… {REFUSALS[mark]} …”" for mark in sorted(said)]
    return "\n".join([*rows, "", "The errors say:", "", *reasons]) + "\n"


def page(old: str) -> str:
    """The page with the table as it is now."""
    marked = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)
    return marked.sub(lambda match: match[1] + page_table() + match[2], old)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
