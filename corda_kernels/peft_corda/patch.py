"""One line that puts this package's `preprocess_corda` in the place of PEFT's."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

from torch import nn

from corda_kernels.errors import CompatibilityError, CompatibilityWarning, warn
from corda_kernels.peft_corda.cache import CordaEigens
from corda_kernels.peft_corda.preprocess import Options, preprocess_corda

# Versions of PEFT under which the tests of this integration have passed.
TRIED_VERSIONS = ("0.19.1", "0.20.0", "0.21.2")

_HOME = "peft.tuners.lora.corda"
_FUNCTION = "preprocess_corda"
_PARAMETERS = ["model", "lora_config", "run_model", "hooked_model"]


class PeftPatch(contextlib.AbstractContextManager["PeftPatch"]):
    """A patch in force. `restore` ends it, and so does the end of a `with` block.

    Attributes:
        modules: names of the modules, beside PEFT's own, that had imported PEFT's function already
            and were given this one.
    """

    def __init__(self, replacement: Callable[..., None]) -> None:
        self._undo = contextlib.ExitStack()
        self.modules: list[str] = []
        home = self._home()
        original = getattr(home, _FUNCTION, None)
        self._put(home, _FUNCTION, replacement)
        loaded: list[object] = [] if original is None else list(sys.modules.values())
        for module in loaded:
            if not isinstance(module, ModuleType):
                continue
            names = [name for name, value in list(vars(module).items()) if value is original]
            for name in names:
                self._put(module, name, replacement)
            if names:
                self.modules.append(module.__name__)

    def _home(self) -> ModuleType:
        """PEFT's module, or one in its place where PEFT cannot import it for lack of attrs."""
        tried = f"this integration was tried with peft {', '.join(TRIED_VERSIONS)}"
        try:
            home = importlib.import_module(_HOME)
        except ModuleNotFoundError as error:
            if error.name not in ("attr", "attrs"):
                raise CompatibilityError(
                    f"the installed peft {_installed()} has no module {_HOME} ({error}): {tried}"
                ) from error
            home = ModuleType(_HOME, "Stands in for PEFT's module, which needs attrs.")
            home.CordaEigens = CordaEigens  # type: ignore[attr-defined]
            sys.modules[_HOME] = home
            self._undo.callback(sys.modules.pop, _HOME, None)
            parent, _, name = _HOME.rpartition(".")
            self._put(sys.modules[parent], name, home)
            return home
        found = list(inspect.signature(getattr(home, _FUNCTION)).parameters)[: len(_PARAMETERS)]
        if found != _PARAMETERS:
            raise CompatibilityError(
                f"{_FUNCTION} of the installed peft {_installed()} takes ({', '.join(found)}), not "
                f"({', '.join(_PARAMETERS)}): {tried}"
            )
        return home

    def _put(self, module: ModuleType, name: str, value: object) -> None:
        self._undo.enter_context(mock.patch.object(module, name, value, create=True))

    def restore(self) -> None:
        """Puts everything back as it was; a second call does nothing."""
        self._undo.close()

    def __exit__(self, *_: object) -> None:
        self.restore()


def patch_peft(**options: Any) -> PeftPatch:
    """Makes `from peft.tuners.lora.corda import preprocess_corda` give this package's function.

    For the rest of the process, or as a context manager for its block. Call it before the import;
    modules that have the function as a global already are given the new one, under whatever name
    they hold it. A reference kept elsewhere, in a local variable or an object, stays PEFT's.

    Args:
        options: those of `preprocess_corda`, see `Options`, as defaults for every call.

    Raises:
        ConfigError: an option has a value that is not allowed.
        CompatibilityError: the installed PEFT has no such function, or one of other arguments. With
            a version that is not in `TRIED_VERSIONS` there is a CompatibilityWarning.
    """
    Options(**options)
    if _installed() not in TRIED_VERSIONS:
        warn(
            f"peft {_installed()} is installed; this integration was tried with "
            f"{', '.join(TRIED_VERSIONS)}: check the first adapter",
            CompatibilityWarning,
        )

    @functools.wraps(preprocess_corda)
    def replacement(
        model: nn.Module,
        lora_config: Any,
        run_model: Callable[[], object] | None = None,
        hooked_model: nn.Module | None = None,
        **ours: Any,
    ) -> None:
        preprocess_corda(model, lora_config, run_model, hooked_model, **(options | ours))

    return PeftPatch(replacement)


def _installed() -> str:
    return importlib.metadata.version("peft")
