"""Versions of the libraries that a result depends on, noted beside it."""

from __future__ import annotations

import importlib.metadata
import sys

_LIBRARIES = ("corda_kernels", "torch", "transformers", "peft")


def library_versions() -> dict[str, str]:
    """Version of each library by its name."""
    return {library: _version(library) for library in _LIBRARIES}


def _version(library: str) -> str:
    if library == __package__:  # which may run from its sources, without being installed
        return str(sys.modules[__package__].__version__)
    return importlib.metadata.version(library)
