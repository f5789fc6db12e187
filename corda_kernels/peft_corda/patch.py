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

from corda_kernels.errors import CompatibilityError, CompatibilityWarning, warn
from corda_kernels.peft_corda.cache import CordaEigens
from corda_kernels.peft_corda.preprocess import Options, preprocess_corda

# Versions of PEFT under which the tests of this integration have passed.
TRIED_VERSIONS = ("0.20.0", "0.21.2")

_TRIED = f"this integration was tried with peft {', '.join(TRIED_VERSIONS)}"
_PARENT, _NAME = "peft.tuners.lora", "corda"
_HOME = f"{_PARENT}.{_NAME}"
_FUNCTION = "preprocess_corda"
_PARAMETERS = ["model", "lora_config", "run_model", "hooked_model"]


class PeftPatch(contextlib.ExitStack):
    """A patch in force. `restore` ends it, and so does the end of a `with` block.

    Attributes:
        modules: names of the modules, beside PEFT's own, that had imported PEFT's function already
            and were given this one.
    """

    def __init__(self, replacement: Callable[..., None]) -> None:
        super().__init__()
        self.modules: list[str] = []
        home = self._home()
        original = getattr(home, _FUNCTION, None)
        self._put(home, _FUNCTION, replacement)
        loaded = [] if original is None else list(sys.modules.values())
        for module in [each for each in loaded if isinstance(each, ModuleType)]:
            names = [name for name, value in list(vars(module).items()) if value is original]
            for name in names:
                self._put(module, name, replacement)
            if names:
                self.modules.append(module.__name__)

    def _home(self) -> ModuleType:
        """PEFT's module, or one in its place where PEFT cannot import it for lack of attrs."""
        try:
            home = importlib.import_module(_HOME)
        except ModuleNotFoundError as error:
            if error.name not in ("attr", "attrs"):
                raise CompatibilityError(
                    f"peft {_installed()} has no module {_HOME} ({error}): {_TRIED}"
                ) from error
            home = ModuleType(_HOME, "Stands in for PEFT's module, which needs attrs.")
            home.CordaEigens = CordaEigens  # type: ignore[attr-defined]
            sys.modules[_HOME] = home
            self.callback(sys.modules.pop, _HOME, None)
            self._put(sys.modules[_PARENT], _NAME, home)
            return home
        found = list(inspect.signature(getattr(home, _FUNCTION)).parameters)[: len(_PARAMETERS)]
        if found != _PARAMETERS:
            raise CompatibilityError(
                f"{_FUNCTION} of peft {_installed()} takes ({', '.join(found)}), not "
                f"({', '.join(_PARAMETERS)}): {_TRIED}"
            )
        return home

    def _put(self, module: ModuleType, name: str, value: object) -> None:
        self.enter_context(mock.patch.object(module, name, value, create=True))

    def restore(self) -> None:
        """Puts everything back as it was; a second call does nothing."""
        self.close()


def patch_peft(**options: Any) -> PeftPatch:
    """Makes `from peft.tuners.lora.corda import preprocess_corda` give this package's function.

    It holds for the rest of the process, or as a context manager for the block. Call it before that
    import. Modules that have already imported the function get the new one, under whatever name
    they hold it; a reference in a local variable or an object stays PEFT's.

    Args:
        options: the options of `preprocess_corda`, as defaults for every call.

    Raises:
        ConfigError: an option has a value that is not allowed.
        CompatibilityError: the installed PEFT has no such function, or it takes other arguments. A
            version that was not tested gives a CompatibilityWarning.

    """
    Options(**options)
    if _installed() not in TRIED_VERSIONS:
        warn(
            f"peft {_installed()} is installed; {_TRIED}: check the first adapter",
            CompatibilityWarning,
        )
    ours = functools.partial(preprocess_corda, **options)
    return PeftPatch(functools.update_wrapper(ours, preprocess_corda))


def _installed() -> str:
    return importlib.metadata.version("peft")
