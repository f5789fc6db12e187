from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import corda_kernels
from corda_kernels.versions import library_versions

ROOT = Path(__file__).parent.parent


def test_versions_are_those_of_what_is_imported() -> None:
    found = library_versions()
    assert found["corda_kernels"] == importlib.metadata.version("corda_kernels")
    assert set(found) == {"corda_kernels", "torch", "transformers", "peft"}


def test_the_sources_know_their_version_where_they_are_not_installed() -> None:
    code = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name == "corda_kernels":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from corda_kernels.versions import library_versions
print(library_versions()["corda_kernels"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == corda_kernels.__version__


def test_the_citation_is_of_this_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {corda_kernels.__version__}" in lines
