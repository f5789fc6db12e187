"""The claims of CorDA and CorDA++ on a real model, for sceptics to rerun.

    python benches/finetune.py run MODEL DATA FOLDER --profile cpu --workers 2
    python benches/finetune.py report FOLDER

DATA is a folder with gsm8k_train.jsonl and gsm8k_test.jsonl (from
github.com/openai/grade-school-math; fields question and answer), nq_open_dev.jsonl and
nq_open_efficientqa_dev.jsonl (from github.com/google-research-datasets/natural-questions, nq_open;
question and answer, a list).

Adapters of equal size (the published form, the pair, lora-r and task-frozen have about half as many
parameters) are trained on gsm8k_train: the same problems in the same order from each
method's start, with each learning rate of its grid; then each method with its best rate on other
problems. Three things are measured on the way, as negative log-likelihood a token: answers of
gsm8k_test, the task; answers of nq_open_efficientqa_dev after a few answered questions, what is
kept of knowledge (without the end token, which would measure the format); and prose. At the end of
the profiles cpu, forms and gpu the right answer is ranked among ten. KPM calibrates on nq_open_dev,
IPM on gsm8k_train, as do task starts, on problems that none is trained on.

Each run is a file. A run that is killed begins anew, those that are done stay.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from finetuning.experiment import Experiment, collected
from finetuning.profiles import PROFILES

from corda_kernels.errors import CordaError
from corda_kernels.files import write_json

app = typer.Typer(add_completion=False, no_args_is_help=True, help=(__doc__ or "").split("\n")[0])


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Folder, hub id or GGUF file.")],
    data: Annotated[Path, typer.Argument(help="Folder with the four data files.")],
    folder: Annotated[
        Path, typer.Argument(help="Where the results go; an old one is gone on with.")
    ],
    profile: Annotated[
        Literal["smoke", "forms", "starts", "starts-gpu", "cpu", "gpu"],
        typer.Option(help="How large."),
    ] = "smoke",
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the runs.")] = 1,
    text: Annotated[
        Path | None, typer.Option(help="Prose to measure on, instead of Python's help topics.")
    ] = None,
) -> None:
    """Does the runs that are not done yet."""
    experiment = Experiment(model, data, folder, profile, PROFILES[profile], text)
    if workers == 1:
        experiment.go_on()
        return
    command = [sys.executable, *sys.argv, "--workers", "1"]
    processes = [subprocess.Popen(command) for _ in range(workers)]
    failed = sum(process.wait() != 0 for process in processes)
    if failed:
        raise CordaError(f"{failed} of {workers} workers failed: see above, then run it again")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Where the results are.")]) -> None:
    """Writes finetune.json, table.md and two plots from what is done so far."""
    from finetuning.plots import draw
    from finetuning.starts import rates, starts
    from finetuning.table import forms, grid, table

    results = collected(folder)
    write_json(folder / "finetune.json", results)
    profile = results["settings"]["profile"]
    if profile == "forms":
        text = f"{forms(results)}\n"
    else:
        chosen, all_rates = (starts, rates) if profile.startswith("starts") else (table, grid)
        text = f"{chosen(results)}\n\nAll learning rates:\n\n{all_rates(results)}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    if profile != "forms":  # which is measured at its end only
        draw(results, folder)
    print(text)


def main() -> None:
    """Runs the command line; errors are one line."""
    try:
        app()
    except CordaError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
