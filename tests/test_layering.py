"""The package's layers: what a file may import, and what importing the package costs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import corda_kernels

ROOT = Path(corda_kernels.__file__).parent
# Every file but the package's own __init__, which gathers the public names of all.
FILES = sorted(
    path.relative_to(ROOT.parent) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"
)

# A part of the package may import parts of earlier lines, and itself.
LAYERS = [
    {"errors", "fields"},
    {"arguments", "outputs"},
    {"files", "linears", "memory", "precision", "progress", "usage", "versions"},
    {"kernels"},
    {"text", "models", "linalg"},
    {"calibration"},
    {"planning", "adapter"},
    {"init", "training"},
    {"peft_corda"},
    {"integrations"},
    {"bench", "report"},
    {"cli"},
    {"__main__"},
]
FORBIDDEN = {("calibration", "linalg")}  # though its line is earlier


def allowed(part: str, imported: str) -> bool:
    line = {name: number for number, names in enumerate(LAYERS) for name in names}
    if (part, imported) in FORBIDDEN:
        return False
    return part == imported or line.get(imported, len(LAYERS)) < line[part]


def imported_parts(tree: ast.AST, file: Path) -> Iterator[str]:
    """Names right below corda_kernels that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.parts[: -node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, *rest = target.split(".")
            if top == "corda_kernels" and rest != ["__version__"]:
                yield rest[0] if rest else ""


def offences(part: str, source: str, file: Path) -> list[str]:
    return [
        imported
        for imported in imported_parts(ast.parse(source), file)
        if not allowed(part, imported)
    ]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_imports_nothing_from_above(file: Path) -> None:
    part = file.parts[1].removesuffix(".py")
    assert offences(part, (ROOT.parent / file).read_text(encoding="utf-8"), file) == []


def test_every_part_of_the_package_has_its_layer() -> None:
    parts = {file.parts[1].removesuffix(".py") for file in FILES}
    assert parts <= set().union(*LAYERS)


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("kernels", "import corda_kernels.models", ["models"]),
        ("kernels", "from corda_kernels import models", ["models"]),
        ("kernels", "from corda_kernels.models import decoder", ["models"]),
        ("kernels", "from ..models import decoder", ["models"]),
        ("kernels", "from .. import models", ["models"]),
        ("kernels", "def f():\n    from corda_kernels.models import decoder", ["models"]),
        ("kernels", "from . import reference\nfrom .cpu import syrk_", []),
        ("kernels", "from corda_kernels.errors import BackendError", []),
        ("kernels", "import torch\nfrom corda_kernels import __version__", []),
        ("calibration", "from corda_kernels.linalg import co_svd", ["linalg"]),
        ("linalg", "from corda_kernels.models import decoder", ["models"]),
        ("linalg", "from corda_kernels.text import batches", ["text"]),
        ("linalg", "from corda_kernels.calibration import calibrate", ["calibration"]),
        ("planning", "from corda_kernels.adapter import factors", ["adapter"]),
        ("cli", "from corda_kernels import bench, report, init", []),
        ("cli", "from corda_kernels import init_corda", ["init_corda"]),
        ("cli", "import corda_kernels", [""]),
    ],
)
def test_an_import_from_above_is_found_however_it_is_written(
    part: str, source: str, found: list[str]
) -> None:
    assert offences(part, source, Path("corda_kernels", part, "file.py")) == found


def packages_with_public_names() -> list[str]:
    modules = [module.name for module in pkgutil.walk_packages([str(ROOT)], "corda_kernels.")]
    sources = {name: ROOT.parent.joinpath(*name.split(".")) for name in modules}
    return [
        name
        for name, path in sources.items()
        if (path / "__init__.py").is_file() and "__all__" in (path / "__init__.py").read_text()
    ]


@pytest.mark.parametrize("package", ["corda_kernels", *packages_with_public_names()])
def test_public_names_exist(package: str) -> None:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []


def test_importing_the_package_starts_no_cuda_and_loads_no_model_library() -> None:
    code = """
import sys
import corda_kernels, corda_kernels.kernels
heavy = {"transformers", "peft", "accelerate", "cupy", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
import torch
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
