from __future__ import annotations

import ast
import importlib
import inspect
import types
from pathlib import Path
from typing import Any

import pytest

import corda_kernels

TREE = ast.parse(Path(corda_kernels.__file__).read_text(encoding="utf-8"))
MODULES = {"errors", "kernels"}
HOMES: dict[str, str] = corda_kernels._HOMES


def type_checking_imports() -> dict[str, str]:
    """The names that a type checker sees, each with the part of the package it comes from."""
    (block,) = (
        node
        for node in TREE.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname is None
            found[alias.name] = (node.module or "").removeprefix("corda_kernels").lstrip(".")
    return found


def documented(name: str) -> dict[str, Any]:
    """A public function or class, and what the package itself defines on the class."""
    value = getattr(corda_kernels, name)
    found = {name: value}
    for member, entry in vars(value).items() if inspect.isclass(value) else ():
        entry = getattr(entry, "__func__", entry)
        if not member.startswith("_") and isinstance(entry, property | types.FunctionType):
            found[f"{name}.{member}"] = entry
    return found


@pytest.mark.parametrize("name", corda_kernels.__all__)
def test_a_public_name_is_its_homes_object(name: str) -> None:
    value = getattr(corda_kernels, name)
    if name in MODULES:
        assert value is importlib.import_module(f"corda_kernels.{name}")
    elif name != "__version__":
        home = importlib.import_module(f"corda_kernels.{HOMES[name]}")
        assert value is getattr(home, name)
        assert value.__module__.startswith(f"corda_kernels.{HOMES[name]}")


def test_all_lists_agree() -> None:
    assert type_checking_imports() == HOMES | dict.fromkeys(MODULES, "")
    assert set(corda_kernels.__all__) == HOMES.keys() | MODULES | {"__version__"}
    assert len(corda_kernels.__all__) == len(set(corda_kernels.__all__))
    assert dir(corda_kernels) == sorted(corda_kernels.__all__)


@pytest.mark.parametrize("part", ["calibration", "linalg", "adapter", "planning", "training"])
def test_a_home_lists_its_public_names(part: str) -> None:
    home = importlib.import_module(f"corda_kernels.{part}")
    assert {name for name in HOMES if HOMES[name] == part} <= set(home.__all__)
    assert all(hasattr(home, name) for name in home.__all__)


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from corda_kernels import *", names)
    assert names.keys() - {"__builtins__"} == set(corda_kernels.__all__)


@pytest.mark.parametrize("name", sorted(HOMES))
def test_what_is_public_is_documented(name: str) -> None:
    for what, value in documented(name).items():
        assert value.__doc__, what
        first = value.__doc__.strip().partition("\n")[0]
        # A dataclass without a docstring gets its signature for one.
        assert not first.startswith(f"{name}("), what


@pytest.mark.parametrize("name", [n for n in vars(corda_kernels.errors) if n[0].isupper()])
def test_an_error_is_documented_and_can_be_caught_as_ours(name: str) -> None:
    error = getattr(corda_kernels.errors, name)
    assert error.__doc__
    assert issubclass(error, corda_kernels.errors.CordaError | corda_kernels.errors.CordaWarning)


@pytest.mark.parametrize("name", ["nothing", "_private", "CordaModel"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'corda_kernels' has no attribute '{name}'"):
        getattr(corda_kernels, name)
    assert not hasattr(corda_kernels, name)


def test_a_name_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(corda_kernels), "CordaConfig", raising=False)
    value = corda_kernels.CordaConfig
    assert vars(corda_kernels)["CordaConfig"] is value
