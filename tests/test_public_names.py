from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import corda_kernels

# The stub is what names are loaded by, and what a type checker sees.
STUB = ast.parse(Path(corda_kernels.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
IMPORTED = {
    alias.name: node.module
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
HOMES = {name: home for name, home in IMPORTED.items() if home}
MODULES = IMPORTED.keys() - HOMES.keys()


def documented(name: str) -> dict[str, Any]:
    """A public function or class, and what the package itself defines on the class."""
    value = getattr(corda_kernels, name)
    found = {name: value}
    for member, entry in vars(value).items() if inspect.isclass(value) else ():
        entry = getattr(entry, "__func__", entry)
        if not member.startswith("_") and isinstance(entry, property | types.FunctionType):
            found[f"{name}.{member}"] = entry
    return found


def test_a_public_name_is_its_homes_object() -> None:
    for name in HOMES:
        home = importlib.import_module(f"corda_kernels.{HOMES[name]}")
        value = getattr(corda_kernels, name)
        assert value is getattr(home, name), name
        assert value.__module__.startswith(f"corda_kernels.{HOMES[name]}"), name
    for name in MODULES:
        assert getattr(corda_kernels, name) is importlib.import_module(f"corda_kernels.{name}")


def test_all_lists_agree() -> None:
    assert set(corda_kernels.__all__) == IMPORTED.keys()
    assert len(corda_kernels.__all__) == len(set(corda_kernels.__all__))
    assert set(dir(corda_kernels)) >= set(corda_kernels.__all__)


def test_a_home_lists_its_public_names() -> None:
    for part in ("calibration", "linalg", "adapter", "planning", "training"):
        home = importlib.import_module(f"corda_kernels.{part}")
        assert {name for name in HOMES if HOMES[name] == part} <= set(home.__all__)


def test_every_listed_name_exists_once() -> None:
    modules = pkgutil.walk_packages(corda_kernels.__path__, "corda_kernels.")
    packages = ["corda_kernels", *(module.name for module in modules if module.ispkg)]
    for package in packages:
        module = importlib.import_module(package)
        names = getattr(module, "__all__", [])
        assert len(set(names)) == len(names), package
        assert [name for name in names if not hasattr(module, name)] == [], package


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from corda_kernels import *", names)
    assert names.keys() - {"__builtins__"} == set(corda_kernels.__all__)


def test_what_is_public_is_documented() -> None:
    public = {what: value for name in HOMES for what, value in documented(name).items()}
    # A dataclass without a docstring gets its signature for one.
    bare = [
        what
        for what, value in public.items()
        if not value.__doc__ or value.__doc__.strip().startswith(f"{what}(")
    ]
    assert not bare


def test_help_shows_the_options_of_a_config() -> None:
    config = corda_kernels.CordaConfig
    assert {field.name for field in fields(config)} == set(inspect.signature(config).parameters)


def test_an_error_is_documented_and_can_be_caught_as_ours() -> None:
    errors = corda_kernels.errors
    found = {name: error for name, error in vars(errors).items() if name[0].isupper()}
    ours = errors.CordaError, errors.CordaWarning
    assert [
        name for name, error in found.items() if not error.__doc__ or not issubclass(error, ours)
    ] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    for name in ("nothing", "_private", "CordaModel"):
        with pytest.raises(AttributeError, match=f"corda_kernels attribute {name}"):
            getattr(corda_kernels, name)
        assert not hasattr(corda_kernels, name)


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh process has loaded once it has run the code."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_no_torch() -> None:
    assert "torch" not in loaded_by("import corda_kernels")


def test_importing_the_kernels_starts_no_cuda_and_loads_no_model_library() -> None:
    code = "import corda_kernels.kernels, torch; assert not torch.cuda.is_initialized()"
    heavy = {"transformers", "peft", "accelerate", "cupy", "matplotlib"}
    assert heavy & loaded_by(code) == set()
