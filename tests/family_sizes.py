"""Sizes of tiny models' configs, which the types of models share."""

from typing import Any

Sizes = dict[str, Any]
# Of every tiny decoder in the tests.
DECODER: Sizes = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TEXT = DECODER | {
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ONE = TEXT | {"num_hidden_layers": 1}
# Learned positions that begin behind the padding token's.
BEHIND = {"max_position_embeddings": 66}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "rotary_dim": 4}
E = 4
ROUTED: Sizes = {
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
SHARED = ROUTED | {"shared_expert_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
DELTA: Sizes = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
PER_LAYER: Sizes = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 60,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Of an encoder and a decoder each has one layer.
TWO: Sizes = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 64,
}
T5: Sizes = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
IMAGE: Sizes = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "mlp_ratio": 2,
    "num_labels": 3,
}
STAGES: Sizes = {
    "image_size": 32,
    "num_labels": 3,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "num_stages": 2,
    "hidden_sizes": [16, 32],
}
SWIN = STAGES | {"patch_size": 4, "window_size": 4}
PYRAMID = STAGES | {
    "num_encoder_blocks": 2,
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}
WAVE = {name: TEXT[name] for name in TEXT if name != "max_position_embeddings"} | {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "squeeze_factor": 2,
}
VISION: Sizes = IMAGE | {"image_size": 16, "projection_dim": 32}  # four patches
LLAMA, QWEN2 = TEXT | {"model_type": "llama"}, TEXT | {"model_type": "qwen2"}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
QWEN_TEXT = TEXT | {"rope_parameters": ROPE}
QWEN_VISION: Sizes = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
QWEN3_VISION = QWEN_VISION | {
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
QWEN = {
    "image_token_id": 59,
    "vision_start_token_id": 58,
    "vision_end_token_id": 57,
    "video_token_id": 56,
}
OPT = TEXT | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
MLLAMA_VISION = VISION | {
    "num_global_layers": 1,
    "attention_heads": 4,
    "vision_output_dim": 64,
    "intermediate_layers_indices": [0],
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
}
FLORENCE_VISION: Sizes = {
    "patch_size": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, True],
    "embed_dim": [16, 32],
    "num_heads": [2, 2],
    "num_groups": [2, 2],
    "depths": [1, 1],
    "window_size": 2,
    "projection_dim": 32,
    "max_temporal_embeddings": 4,
    "max_position_embeddings": 8,
}
WHISPER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
VOXTRAL: Sizes = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_mel_bins": 8,
    "max_source_positions": 20,
}
SOUND = WHISPER | {"num_mel_bins": 8, "max_source_positions": 20}
