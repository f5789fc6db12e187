"""The CUDA sources as one fatbin: built at installation where there is nvcc, described beside it.

Only the standard library is used here: setup.py loads this file by its path, before anything is
installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

FATBIN = "kernels.fatbin"
RECORD = "build.json"

# Machine code for one runs on all later minor versions of the same generation. The last is also
# included as PTX, from which the driver compiles for later generations.
ARCHITECTURES = (80, 90, 100)

OPTIONS = ("-std=c++17",)  # for nvcc and NVRTC alike
_TIMEOUT_S = 600


class Build(NamedTuple):
    """What was built, as recorded beside it.

    Attributes:
        sources: digest of the sources.
        architectures: those in the fatbin, 90 for compute capability 9.0; none if there is none.
        compiler: version of nvcc.
        failure: why there is no fatbin.
    """

    sources: str
    architectures: tuple[int, ...] = ()
    compiler: str | None = None
    failure: str | None = None


def source_files(folder: Path) -> list[Path]:
    """The CUDA sources in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh"))


def digest(folder: Path) -> str:
    """SHA-256 of the names and texts of the sources."""
    total = hashlib.sha256()
    for path in source_files(folder):
        text = path.read_bytes()
        total.update(f"{path.name} {len(text)}\n".encode() + text)
    return total.hexdigest()


def find_nvcc() -> str | None:
    """nvcc below CUDA_HOME, or else on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def build(sources: Path, target: Path) -> Build:
    """Compiles the sources into a fatbin in `target`, in place of an earlier one, and records it.

    That there is no nvcc, or that it fails, is recorded too and does not raise.
    """
    target.joinpath(FATBIN).unlink(missing_ok=True)
    known = digest(sources)
    nvcc = find_nvcc()
    if nvcc is None:
        result = Build(known, failure="there was no nvcc at installation, on PATH or in CUDA_HOME")
    else:
        try:
            result = _compile(nvcc, sources, target / FATBIN, known)
        except (OSError, subprocess.SubprocessError) as error:
            result = Build(known, failure=f"nvcc failed at installation: {_cause(error)}")
    if result.failure is not None:
        target.joinpath(FATBIN).unlink(missing_ok=True)
    target.joinpath(RECORD).write_text(json.dumps(result._asdict()) + "\n", encoding="utf-8")
    return result


def compile_command(nvcc: str, sources: Path, fatbin: Path, wanted: tuple[int, ...]) -> list[str]:
    """The call of nvcc that compiles for all of `wanted`, and the last of them as PTX."""
    command = [nvcc, *OPTIONS, "-O3", "-fatbin", "-o", str(fatbin), str(sources / "kernels.cu")]
    for architecture in wanted:
        code = f"sm_{architecture}"
        if architecture == wanted[-1]:
            code = f"[{code},compute_{architecture}]"
        command += ["-gencode", f"arch=compute_{architecture},code={code}"]
    return command


def _compile(nvcc: str, sources: Path, fatbin: Path, known: str) -> Build:
    listed = _run([nvcc, "--list-gpu-code"])
    wanted = tuple(value for value in ARCHITECTURES if re.search(rf"\bsm_{value}\b", listed))
    version = re.search(r"release [\d.]+, V([\d.]+)", _run([nvcc, "--version"]))
    compiler = version[1] if version else "unknown"
    if not wanted:
        reason = f"nvcc {compiler} compiles for none of {', '.join(map(str, ARCHITECTURES))}"
        return Build(known, compiler=compiler, failure=reason)
    _run(compile_command(nvcc, sources, fatbin, wanted))
    return Build(known, wanted, compiler)


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
    ).stdout


def _cause(error: OSError | subprocess.SubprocessError) -> str:
    """The first line of what the compiler said that names an error, else the exception itself."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in (error.stderr + error.stdout).splitlines()]
        named = [line for line in lines if re.search("error|fatal", line, re.IGNORECASE)]
        return next(iter(named or filter(None, lines)), f"exit status {error.returncode}")
    return str(error)


def recorded(folder: Path) -> Build:
    """What was built in a folder; without a record, or with a damaged one, a failure."""
    try:
        found = json.loads(folder.joinpath(RECORD).read_text(encoding="utf-8"))
        architectures = tuple(int(value) for value in found.pop("architectures"))
        return Build(architectures=architectures, **found)
    except FileNotFoundError:
        return Build("", failure="no fatbin was built")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Build("", failure=f"the fatbin's record {RECORD} is damaged ({error!r})")


def unusable(folder: Path, capability: tuple[int, int]) -> str | None:
    """Why the fatbin in a folder with sources is not for a device; None where it is."""
    build = recorded(folder)
    if build.failure is not None:
        return build.failure
    if build.sources != digest(folder):
        return "the fatbin was built from other sources"
    if not folder.joinpath(FATBIN).is_file():
        return "the fatbin is missing"
    device = 10 * capability[0] + capability[1]
    same = [value for value in build.architectures if value // 10 == capability[0]]
    if device < min(same, default=max(build.architectures)):
        listed = ", ".join(f"sm_{value}" for value in build.architectures)
        return f"the fatbin has no code for sm_{device}, only {listed}"
    return None


def describe(folder: Path) -> str:
    """One line on what was built in a folder."""
    build = recorded(folder)
    if build.failure is not None:
        return f"not compiled: {build.failure}"
    listed = ", ".join(f"sm_{value}" for value in build.architectures)
    return f"compiled for {listed} by nvcc {build.compiler}"
