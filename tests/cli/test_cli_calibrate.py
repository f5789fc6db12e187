"""`corda-kernels calibrate`: memory limits, kills and full disks."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import CONTEXT, execute
from small_text import SMALL

from corda_kernels.adapter import read_adapter
from corda_kernels.calibration import CovarianceSet

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("more", [(), ("--candidates", 2)], ids=["halves", "candidates"])
def test_within_a_memory_limit_the_file_and_the_adapter_are_the_same(
    invoke: Callable[..., str], place: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    data = ("--data", place / "text.txt", *SMALL, "--batch-size", 2, *more)
    shown = {}
    for limit in ("1GB", "65KB"):
        shown[limit] = invoke(
            "calibrate", place / "model", tmp_path / limit, *data, "--memory-limit", limit
        ).replace(limit, "")
        invoke(
            "init",
            place / "model",
            tmp_path / f"adapter-{limit}",
            *data,
            "--mode",
            "kpm",
            "--memory-limit",
            limit,
        )
    assert shown["65KB"] == shown["1GB"]
    assert (tmp_path / "65KB").read_bytes() == (tmp_path / "1GB").read_bytes()
    first, second = (read_adapter(tmp_path / f"adapter-{limit}") for limit in ("1GB", "65KB"))
    assert first.record == second.record
    assert len(list(tmp_path.iterdir())) == 4


def killed_while_calibrating(arguments: list[str], checkpoint: Path) -> None:
    """Runs the program in a process of its own and kills it as soon as it keeps a checkpoint."""
    process = CONTEXT.Process(target=execute, args=(["-m", "corda_kernels", *arguments],))
    process.start()
    while not checkpoint.exists():
        assert process.is_alive(), "it ended before it kept anything"
        time.sleep(0.001)
    process.kill()
    process.join()


@pytest.mark.parametrize(
    ("ending", "more"),
    [("1", ()), ("2", ()), ("block-0", ("--memory-limit", "65KB"))],
    ids=["first half", "second half", "block by block"],
)
def test_calibrate_resumes_after_a_kill_with_the_same_file(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    place: Path,
    tmp_path: Path,
    ending: str,
    more: tuple[object, ...],
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--data", place / "text.txt", "--samples", 64, "--seq-len", 8, "--rank", 4)
    invoke("calibrate", place / "model", whole, *options)
    arguments = ["calibrate", place / "model", out, *options, *more, "--checkpoint-every", 8]
    checkpoint = tmp_path / f"out.checkpoint-{ending}"
    first = checkpoint if more else tmp_path / "out.checkpoint-1"
    killed_while_calibrating([str(argument) for argument in arguments], checkpoint)
    assert not out.exists()

    status, _, lines = command(*arguments)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {first} was left by an interrupted")
    status, _, lines = command(*arguments, "--seed", 1, "--resume")
    assert (status, len(lines)) == (2, 1)
    assert "is the checkpoint of another run, which differs in data" in lines[0]

    whole_checkpoint = first.read_bytes()
    first.write_bytes(whole_checkpoint[:-1])
    status, _, lines = command(*arguments, "--resume")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: {first} is truncated")
    first.write_bytes(whole_checkpoint)

    invoke(*arguments, "--resume")
    # What stands in the file beside the sums says the same, too.
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


def test_a_disk_that_is_full_at_the_end_keeps_the_old_file_and_the_checkpoints(
    invoke: Callable[..., str],
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    tmp_path: Path,
) -> None:
    from corda_kernels import files

    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ("--data", place / "text.txt", *SMALL, "--checkpoint-every", 32)
    invoke("calibrate", place / "model", whole, *arguments)
    out.write_text("before")
    save = files.save_file

    def full(tensors: Any, path: str, metadata: dict[str, str]) -> None:
        if "covariances/1" in metadata["corda"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, metadata=metadata)

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", full)
        status, _, lines = command("calibrate", place / "model", out, *arguments, "--overwrite")
    assert (status, len(lines)) == (2, 1)
    assert "No space left on device" in lines[0]
    assert out.read_text() == "before"
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"whole", "out", "out.checkpoint-1", "out.checkpoint-2"}
    invoke("calibrate", place / "model", out, *arguments, "--resume", "--overwrite")
    assert out.read_bytes() == whole.read_bytes()


def test_text_that_runs_out_is_one_warning(
    command: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    data = ("--data", place / "text.txt", "--samples", 200, "--seq-len", 16, "--rank", 4)
    status, _, lines = command("calibrate", place / "model", tmp_path / "out", *data)
    assert (status, len(lines)) == (0, 1)
    assert lines[0].startswith(f"warning: {place / 'text.txt'} is used up after ")


def test_the_name_of_the_text_need_not_be_utf_8(
    invoke: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    try:
        text.write_bytes((place / "text.txt").read_bytes())
    except OSError:
        pytest.skip("the file system has no such names")
    data = ("--data", text, *SMALL)
    invoke("calibrate", place / "model", tmp_path / "covariances", *data)
    invoke("init", place / "model", tmp_path / "adapter", "--mode", "ipm", *data)
    provenance = CovarianceSet.load(tmp_path / "covariances").provenance
    for noted in (provenance, read_adapter(tmp_path / "adapter").record.calibration):
        assert noted["data"]["file"] == "caf\ufffd.txt"
