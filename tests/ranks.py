"""Processes that start at once: forked from one that has loaded torch, transformers and PEFT."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.models.auto.modeling_auto", "peft", "corda_kernels"])


def run_ranks(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script, or "-m" and a module, with arguments, on so many ranks, as torchrun does.

    Returns:
        The first exit status that is not 0, and what all ranks wrote, rank by rank.
    """
    words = [str(argument) for argument in arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_run, args=(rank, count, port, folder, words))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            process.kill()  # does nothing to one that has ended
            process.join()
        out, err = (
            "".join((Path(folder) / f"{name}-{rank}").read_text() for rank in range(count))
            for name in ("out", "err")
        )
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess(words, status, out, err)


def _run(rank: int, count: int, port: int, folder: str, words: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}-{rank}", os.O_CREAT | os.O_WRONLY), number)
    execute(words)


def execute(words: list[str]) -> None:
    """Does what Python does with such a command line."""
    module = words[0] == "-m"
    sys.argv = words[module:]
    (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
