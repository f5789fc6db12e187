"""Versions of the libraries that a result depends on, noted beside it."""

from __future__ import annotations

import importlib.metadata

_LIBRARIES = ("corda_kernels", "torch", "transformers", "peft")


def library_versions() -> dict[str, str]:
    """Version of each library by its name."""
    return {library: importlib.metadata.version(library) for library in _LIBRARIES}
