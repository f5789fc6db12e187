"""Does a calibration survive kill -9, and what do its checkpoints cost?

Without arguments: a tiny random model is calibrated from the command line once without
interruption, and then 20 times with a kill at a random moment, spread evenly over the run, and
`--resume`. Every resumed file must equal the first, byte for byte; the exit status says whether all
did.

With a model's folder and a text file: how long one checkpoint of that model takes to write, and its
share of the time that the tokens between two of them take.

    python benches/resume.py [--kills N]
    python benches/resume.py MODEL TEXT [--field NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

WORDS = [f"w{index}" for index in range(60)]


def save_tiny_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def command(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    arguments = [
        *(
            "calibrate",
            str(folder / "model"),
            str(folder / out),
            "--data",
            str(folder / "text.txt"),
        ),
        *("--samples", "600", "--seq-len", "64", "--rank", "8", "--checkpoint-every", "128"),
        *options,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "corda_kernels", *arguments], stdout=subprocess.DEVNULL
    )


def follow(process: subprocess.Popen[bytes], folder: Path, out: str, until: float) -> int:
    """Waits until so many checkpoints have been written, or the end; how many were seen."""
    seen: set[tuple[str, int]] = set()
    while process.poll() is None and len(seen) < until:
        for file in folder.glob(f"{out}.checkpoint-*"):
            with contextlib.suppress(FileNotFoundError):
                seen.add((file.name, file.stat().st_mtime_ns))
        time.sleep(0.0005)
    return len(seen)


def kill_and_resume(kills: int) -> int:
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_tiny_model(folder / "model")
        (folder / "text.txt").write_text(" ".join(choose.choices(WORDS, k=50_000)))
        process = command(folder, "whole")
        total = follow(process, folder, "whole", math.inf)
        whole = (folder / "whole").read_bytes()
        print(f"uninterrupted: {total} checkpoints were seen")
        same = 0
        for number in range(kills):
            process = command(folder, "out")
            # By progress, not by the clock, since the machine's load may change; then some way on.
            progress = (number + choose.random()) / kills * total
            follow(process, folder, "out", progress)
            time.sleep(choose.random() * 0.02)
            process.kill()
            process.wait()
            left = sorted(file.name for file in folder.glob("*out*"))
            if not (folder / "out").exists():
                command(folder, "out", "--resume").wait()
            equal = (folder / "out").read_bytes() == whole
            same += equal
            print(
                f"killed after {progress:5.1f} checkpoints, leaving "
                f"{', '.join(left) or 'nothing'}: {'identical' if equal else 'DIFFERENT'}",
                flush=True,
            )
            for file in folder.glob("out*"):
                file.unlink()
        print(f"{same} of {kills} files identical")
        return 0 if same == kills else 1


def cost(model_folder: str, text: str, field: str) -> int:
    from corda_kernels import calibrate, load_model, load_tokenizer
    from corda_kernels.calibration import CalibrationCheckpoint
    from corda_kernels.calibration.journal import Journal
    from corda_kernels.text import token_batches

    model = load_model(model_folder)
    batches = token_batches(
        text, load_tokenizer(model_folder), samples=8, seq_len=512, batch_size=2, field=field
    )
    written: list[float] = []
    sizes: list[int] = []
    intervals: list[float] = []
    keep, interval = Journal.keep, Journal.interval

    def timed(journal: Journal, *arguments: object) -> None:
        started = time.perf_counter()
        keep(journal, *arguments)
        written.append(time.perf_counter() - started)
        sizes.append(os.path.getsize(journal.file()))

    def noted(journal: Journal, captures: object) -> float:
        intervals.append(interval(journal, captures))
        return 1  # keep after every batch, to time several

    Journal.keep, Journal.interval = timed, noted
    with tempfile.TemporaryDirectory(dir=".") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(model, batches[:1], progress=False)
        started = time.perf_counter()
        calibrate(model, batches, progress=False, checkpoint=CalibrationCheckpoint(f"{folder}/c"))
        total = time.perf_counter() - started - sum(written)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    each = sum(written) / len(written)
    between = intervals[-1] * total / tokens
    print(f"a checkpoint of {sizes[-1] / 1e6:.0f} MB takes {each:.2f} s ({len(written)} written)")
    print(f"calibration takes {1e3 * total / tokens:.2f} ms a token, {between:.0f} s between two")
    print(f"one every {intervals[-1]} tokens, the default, costs {each / between:.2%} of the time")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--field", default="text")
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    if given.model:
        sys.exit(cost(given.model, given.text, given.field))
    sys.exit(kill_and_resume(given.kills))
