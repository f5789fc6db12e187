"""Builds the CUDA kernels into the package; everything declarative stands in pyproject.toml.

The sources in csrc/ are copied to corda_kernels/csrc of what is built, with one fatbin of them
where there is nvcc. An editable installation reads the sources where they are and gets its fatbin
there.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"


def _load(path: Path):
    """The module at a path, without the package around it, which would import torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fatbin = _load(ROOT / "corda_kernels" / "kernels" / "fatbin.py")


class BuildWithKernels(build_py):
    """The package, and the kernels beside it."""

    def run(self) -> None:
        """Builds; a compiler that is missing or fails is said and recorded, and stops nothing."""
        super().run()
        target = SOURCES if self.editable_mode else self._target()
        if not self.editable_mode:
            target.mkdir(parents=True, exist_ok=True)
            for path in fatbin.source_files(SOURCES):
                shutil.copyfile(path, target / path.name)
        result = fatbin.build(SOURCES, target)
        if result.failure is not None:
            self.warn(f"no CUDA kernels were compiled: {result.failure}")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The kernels' files too, for the record of what is installed."""
        outputs = super().get_outputs(include_bytecode)
        if not self.editable_mode and self._target().is_dir():
            outputs += [str(path) for path in self._target().iterdir()]
        return outputs

    def get_source_files(self) -> list[str]:
        """The kernels' sources too, for a source distribution."""
        sources = [str(path.relative_to(ROOT)) for path in fatbin.source_files(SOURCES)]
        return super().get_source_files() + sources

    def _target(self) -> Path:
        return Path(self.build_lib, "corda_kernels", "csrc")


setup(cmdclass={"build_py": BuildWithKernels})
