"""SmoothQuant (arXiv:2211.10438): a model that computes the same, and is easier to quantise.

    python examples/recipes/smoothquant.py MODEL TEXT OUT

Channels of large activations are divided by a scale in the norm before a layer and multiplied by it
in the layer's weight. OUT is then for any tool that quantises weights and activations to 8 bits.

It is for models laid out like Llama (Mistral, Qwen2, SmolLM), whose norms multiply by their weight.
"""

from __future__ import annotations

import sys

from corda_kernels import calibrate, load_model, load_tokenizer, token_batches
from corda_kernels.integrations.statistics import smoothquant_scales
from corda_kernels.models import save_model

READERS = {  # each norm of a block, and the layers that read it
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}

source, text, out = sys.argv[1:]
model = load_model(source, dtype="float32")
batches = token_batches(text, load_tokenizer(source), samples=64, seq_len=128)
scales = smoothquant_scales(model, calibrate(model, batches), alpha=0.5)
for index, block in enumerate(model.model.layers):
    for norm, readers in READERS.items():
        scale = scales[f"model.layers.{index}.{readers[0]}"]
        block.get_submodule(norm).weight.data /= scale
        for reader in readers:
            block.get_submodule(reader).weight.data *= scale
save_model(model, out, source=source)
