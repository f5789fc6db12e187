"""The environment of the tests, and their shared fixtures in the processes that run them."""

from __future__ import annotations

import gc
import os

import pytest

# Test processes side by side, and those that they start, would otherwise fight for the cores. It
# must be set before torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network


def pytest_configure(config: pytest.Config) -> None:
    """Loads torch, but not in the process that only hands tests out: the others wait for it."""
    if config.option.dist != "no" and not hasattr(config, "workerinput"):
        return
    gc.disable()  # until all libraries are loaded, see below
    import torch
    from hypothesis import settings

    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
    else:
        os.environ["TRITON_INTERPRET"] = "1"  # must be set before the kernels are defined

    # How long an example takes depends on what runs beside it.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish() -> None:
    """Keeps the libraries' objects out of later collections, which took an eighth of the time."""
    gc.freeze()
    gc.enable()
