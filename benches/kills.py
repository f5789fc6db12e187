"""What is left of a result when its writer is killed: the old or the new, whole, and nothing else.

    python benches/kills.py [--kills 200] [--json results/cpu-kills.json]

Every writer of the package replaces one result by another in a child process, which SIGKILL ends at
one of its operations on the file system, or at some moment. What is then there is read as a user
would read it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from corda_kernels import CordaConfig, CovarianceSet, calibrate, export_lora, init_corda
from corda_kernels.adapter import load_for_training, save_adapter
from corda_kernels.calibration.covariance_set import save_pieces
from corda_kernels.files import digest, write_json
from corda_kernels.models import load_model, save_model

# Python's audit events for what changes a folder; "open" counts only for writing.
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod")
_SHAPE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Writer:
    """One way in which results are written.

    Attributes:
        write: writes result 0 or 1 to a path.
        read: what a user gets from there, in a form that can be compared.
    """

    write: Callable[[Path, int], Any]
    read: Callable[[Path], Any]


def writers(scratch: Path) -> dict[str, Writer]:
    """Every writer by name; `scratch` holds what they start from."""
    # tqdm's own lock is shared with children, and one that is killed while it holds it keeps it.
    tqdm.set_lock(threading.RLock())
    batches = [
        torch.randint(0, 100, (2, 32), generator=torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    plain = [_adapted(batches, seed) for seed in range(2)]
    published = [_adapted(batches, seed, residual="weight") for seed in range(2)]
    sets = [calibrate(_model(), [batch], progress=False) for batch in batches]
    models = [_model(seed) for seed in range(2)]
    folders = [scratch / f"adapter-{number}" for number in range(2)]
    for model, folder in zip(plain, folders, strict=True):
        save_adapter(model, folder)

    def pieces(path: Path, number: int) -> None:
        names = list(sets[number])
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        parts = (CovarianceSet({name: sets[number][name] for name in half}) for half in halves)
        save_pieces(parts, path, lambda notes: notes[0])

    covariances = Writer(lambda path, number: sets[number].save(path), _covariances)
    return {
        "save_adapter": Writer(lambda path, number: save_adapter(plain[number], path), _logits),
        'save_adapter, residual="weight"': Writer(
            lambda path, number: save_adapter(published[number], path), _logits
        ),
        "export_lora": Writer(lambda path, number: export_lora(folders[number], path), _stock),
        "save_model": Writer(
            lambda path, number: save_model(models[number], path, source=scratch), _weights
        ),
        "CovarianceSet.save": covariances,
        "covariances block by block": Writer(pieces, _covariances),
        "write_json": Writer(
            lambda path, number: write_json(path, {"n": [number] * 1000}), Path.read_text
        ),
    }


def examine(
    writer: Writer, folder: Path, kills: int, *, by_time: bool = False, seed: int = 0
) -> dict[str, int]:
    """Kills a writer so many times; how often the old result and the new one were there.

    Args:
        writer: which.
        folder: an empty folder to work in.
        kills: how many, spread evenly from its first operation to its last.
        by_time: whether to kill at random moments in place of operations.
        seed: of these.

    Raises:
        AssertionError: a child outlived its kill, or neither result is there, or something is left
            over after the next run.
    """
    results = []
    for number in range(2):
        writer.write(folder / "result", number)
        results.append(writer.read(folder / "result"))
    assert results[0] != results[1]
    clean = _listing(folder)
    started = time.perf_counter()
    operations = _child(lambda: writer.write(folder / "result", 0), folder)
    duration = time.perf_counter() - started
    moments = random.Random(seed)
    found = {"old": 0, "new": 0}
    for kill in range(kills):
        shutil.rmtree(folder)
        folder.mkdir()
        writer.write(folder / "result", 0)
        if by_time:
            while not _interrupted(
                lambda: writer.write(folder / "result", 1), moments.uniform(0, duration)
            ):
                writer.write(folder / "result", 0)
        else:
            at = 1 + kill * (operations - 1) // (kills - 1)
            _child(lambda: writer.write(folder / "result", 1), folder, at)
        left = writer.read(folder / "result")
        assert left in results, f"kill {kill}: neither the old result nor the new one is there"
        found["old" if left == results[0] else "new"] += 1
        writer.write(folder / "result", 1)
        assert writer.read(folder / "result") == results[1]
        assert _listing(folder) == clean, f"kill {kill} left {_listing(folder)}"
    return found


def _child(work: Callable[[], Any], folder: Path, kill_at: int = 0) -> int:
    """Runs `work` in a child, which dies before that operation of it in `folder`, from 1.

    Returns:
        How many operations there were, where it is not to die.
    """
    reader, pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child_work(work, folder, kill_at, pipe)
    os.close(pipe)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(reader) as counted:
        text = counted.read()
    if kill_at:
        assert os.WIFSIGNALED(status), f"the child outlived a kill at operation {kill_at}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        return kill_at
    assert os.waitstatus_to_exitcode(status) == 0
    return int(text)


def _child_work(work: Callable[[], Any], folder: Path, kill_at: int, pipe: int) -> None:
    _alone()
    count = 0

    def audit(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        inside = bool(details) and str(details[0]).startswith(str(folder))
        changes = event in _CHANGES or (event == "open" and bool(details[2] & os.O_ACCMODE))
        # The swap of two folders goes by way of the C library.
        if (inside and changes) or (event == "ctypes.dlsym" and details[1] == "renameat2"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(audit)
        work()
        os.write(pipe, str(count).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _alone() -> None:
    """Readies a forked child, which has none of its parent's threads; it does not wait for them."""
    torch.set_num_threads(1)
    signal.alarm(60)


def _interrupted(work: Callable[[], Any], seconds: float) -> bool:
    """Runs `work` in a child and kills it after so long; whether it was still at work."""
    pid = os.fork()
    if pid == 0:
        _alone()
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_SHAPE, **_HEADS)).eval()


def _adapted(batches: list[torch.Tensor], seed: int, **options: Any) -> Any:
    """An adapter of rank 2 or 3, as after some training."""
    config = CordaConfig("ipm", rank=2 + seed, progress=False, stability=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = init_corda(_model(), batches, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def _computed(model: Any) -> list[float]:
    return model.eval()(input_ids=torch.arange(8)[None]).logits.flatten().tolist()


def _logits(folder: Path) -> list[float]:
    return _computed(load_for_training(_model(), folder))


def _stock(folder: Path) -> list[float]:
    from peft import PeftModel

    return _computed(PeftModel.from_pretrained(_model(), folder))


def _weights(folder: Path) -> str:
    return digest(load_model(folder).state_dict())


def _covariances(file: Path) -> str:
    found = CovarianceSet.load(file)
    return digest({name: covariance.matrix for name, covariance in found.items()})


def main() -> None:
    """Prints a line for each writer, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of each writer, half of them timed")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, writer in writers(Path(scratch)).items():
            found = {"old": 0, "new": 0}
            for by_time in (False, True):
                folder = Path(tempfile.mkdtemp(dir=scratch))
                kills = given.kills // 2
                for side, count in examine(writer, folder, kills, by_time=by_time).items():
                    found[side] += count
            rows.append({"writer": name, "kills": 2 * kills, **found})
            print(rows[-1], flush=True)
    if given.json:
        write_json(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
