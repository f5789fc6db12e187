"""Versions of the libraries that a result depends on, noted beside it."""

from __future__ import annotations

import importlib.metadata
import sys
from functools import cache

_installed = cache(importlib.metadata.version)  # which parses a file, 2 ms


def library_versions() -> dict[str, str]:
    """Version of each library by its name."""
    found = {name: _installed(name) for name in ("torch", "transformers", "peft")}
    # The own one may run from its sources, without being installed.
    return {"corda_kernels": str(sys.modules["corda_kernels"].__version__)} | found
