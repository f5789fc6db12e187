"""The code on the page of mixtures and vision–language models runs as it stands, on tiny models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from corda_kernels import load_model, token_batches
from corda_kernels.adapter import read_adapter
from corda_kernels.experts import expert_parameters

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "mixtures-and-vision.md"
TEXT = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
pytestmark = pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the page's example of that number, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def example(number: int, **scope: Any) -> dict[str, Any]:
        blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        exec(compile(blocks[number], str(PAGE), "exec"), scope)
        return scope

    return example


# PEFT looks for the names of parameters among those of modules.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_the_mixture(
    run: Callable[..., dict[str, Any]],
    tiny_model: Callable[..., nn.Module],
    save_tokenizer: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_model("qwen3_moe", **TEXT, **HEADS).save_pretrained("my-mixture")
    save_tokenizer(Path("my-mixture"))
    words = " ".join(f"w{index % 60}" for index in range(500))
    Path("my-task.jsonl").write_text(f'{{"text": "{words}"}}\n' * 2)
    short = {"samples": 8, "seq_len": 64}
    monkeypatch.setattr(
        "corda_kernels.token_batches", lambda *given, **_: token_batches(*given, **short)
    )
    model = run(0)["model"]
    base = load_model("my-mixture", dtype="bfloat16")
    parameters = expert_parameters(base)
    layers = read_adapter("my-mixture-adapter").layers
    assert parameters.keys() < layers.keys()
    assert {layers[name].A.shape[1] for name in parameters} == {2 * 32 // 2}
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = base(ids).logits
        loaded = PeftModel.from_pretrained(base, "my-mixture-adapter")
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def save_vision_language_model(folder: str) -> None:
    """A tiny LLaVA with its processor."""
    vision = TEXT | {"model_type": "clip_vision_model", "num_attention_heads": 4}
    config = tf.LlavaConfig(
        text_config=TEXT | HEADS | {"model_type": "llama"},
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        image_token_index=3,
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", "<image>", *(f"w{index}" for index in range(60))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def test_the_vision_language_model(run: Callable[..., dict[str, Any]]) -> None:
    save_vision_language_model("my-vlm")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    images = [(Image.fromarray(each), f"w{i} w7 w9") for i, each in enumerate(pixels)]
    found = run(1, my_images=images)
    layers = read_adapter("my-vlm-adapter").layers
    assert len(layers) == 2 * 7
    assert all(".language_model." in name for name in layers)
    base, batch = load_model("my-vlm"), found["batches"][0]
    assert batch["input_ids"][0].tolist() == [3, 3, 3, 3, 4, 11, 13]
    with torch.no_grad():
        expected = base(**batch).logits
        loaded = PeftModel.from_pretrained(base, "my-vlm-adapter")
        assert torch.equal(loaded(**batch).logits, expected)
