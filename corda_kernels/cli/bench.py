"""`corda-kernels bench`: tables of speed, each against the honest baseline of the same run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from corda_kernels.bench.covariance import CalibrationRow, Row
    from corda_kernels.bench.pipeline import PipelineRow
    from corda_kernels.bench.svd import Row as SvdRow

bench = typer.Typer(
    name="bench", help="Measure kernels against their baselines.", no_args_is_help=True
)


@bench.callback()
def _group() -> None:
    pass


@bench.command()
def covariance(
    dims: Annotated[str, typer.Option(help="Channels, separated by commas.")] = "576,1536,4096",
    tokens: Annotated[int, typer.Option(help="Rows of X.")] = 8192,
    dtypes: Annotated[str, typer.Option(help="Of X, separated by commas.")] = "float32,bfloat16",
    device: options.Device = "auto",
    model: Annotated[
        str | None, typer.Option(help="Also time the calibration of this model, 16 × 512 tokens.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="A file for all results.")] = None,
) -> None:
    """Time C += XᵀX with outlier statistics, and the calibration of a model around it."""
    from corda_kernels.bench.covariance import bench_syrk
    from corda_kernels.bench.timing import environment
    from corda_kernels.models import parse_dtype
    from corda_kernels.outputs import check_output

    if json is not None:
        check_output(json)
    where = options.torch_device(device)
    widths = _numbers(dims)
    _at_least_one("--dims", *widths)
    _at_least_one("--tokens", tokens)
    types = [parse_dtype(dtype.strip()) for dtype in dtypes.split(",")]
    described = environment(where)
    echo(", ".join(f"{key} {value}" for key, value in described.items()))
    echo(
        f"{'backend':<10} {'tokens':>7} {'d':>6} {'dtype':>9} {'p20 ms':>9} {'p50 ms':>9} "
        f"{'p80 ms':>9} {'× addmm':>8} {'TFLOP/s':>8} {'of GEMM':>8} {'of peak':>8} "
        f"{'stats':>7} {'error':>8}"
    )
    results: dict[str, Any] = {"environment": described, "syrk": []}
    for dtype, width in itertools.product(types, widths):
        for row in bench_syrk(tokens, width, dtype, where):
            echo(_line(row))
            results["syrk"].append(row.to_json())
            _keep(results, json)
    if model is not None:
        timed = _calibration(model, str(where))
        results["calibration"] = timed.to_json()
        echo(
            f"calibration of {timed.model}, {timed.tokens} tokens: {timed.calibration.p50:.1f} s, "
            f"bare forward pass {timed.forward.p50:.1f} s, ratio {timed.ratio:.2f}"
        )
        _keep(results, json)


@bench.command()
def pipeline(
    model: options.Model,
    data: options.Data = None,
    samples: options.Samples = 16,
    seq_len: options.SeqLen = 512,
    rank: Annotated[int, typer.Option(help="Components of each layer.")] = 32,
    mode: Annotated[str, typer.Option(help="ipm or kpm.")] = "ipm",
    only: Annotated[
        str | None,
        typer.Option(help="Contestants by commas: peft, patch_peft, init_corda, pissa, eva."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Runs of each, in turn; shown is the one in the middle.")
    ] = 1,
    device: options.Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="A file for all results.")] = None,
) -> None:
    """Time init_corda and the patched PEFT against PEFT's CorDA, PiSSA and EVA, with memory.

    The text is Python's own help topics, or --data FILE. PEFT takes one sequence at a time.
    """
    from corda_kernels.bench.pipeline import CONTESTANTS, STAGES, bench_pipeline
    from corda_kernels.bench.pipeline_methods import Task
    from corda_kernels.bench.timing import environment
    from corda_kernels.outputs import check_output

    if json is not None:
        check_output(json)
    names = CONTESTANTS if only is None else tuple(name.strip() for name in only.split(","))
    if mode not in ("ipm", "kpm") or not set(names) <= set(CONTESTANTS):
        raise ConfigError(
            f"--mode must be ipm or kpm and --only of {', '.join(CONTESTANTS)}, got {mode!r}, "
            f"{only!r}"
        )
    _at_least_one("--rank", rank)
    _at_least_one("--rounds", rounds)
    where = options.torch_device(device)
    described = environment(where)
    echo(", ".join(f"{key} {value}" for key, value in described.items()))
    batches = _sequences(model, data, samples, seq_len)
    tokens = sum(ids.numel() for ids in batches)
    echo(f"{model}, {mode}, rank {rank}, {len(batches)} sequences, {tokens} tokens")
    echo(
        f"{'':<11} {'seconds':>9} {' '.join(f'{stage:>13}' for stage in STAGES)} {'beyond':>9} "
        f"{'growth':>10} {'× PEFT':>8} {'beyond':>8} {'growth':>8} {'overlap':>9}"
    )
    task = Task(model, batches, "ipm" if mode == "ipm" else "kpm", rank, where)
    results: dict[str, Any] = {
        "environment": described,
        "task": {"model": Path(model).name, "mode": mode, "rank": rank, "tokens": tokens},
        "pipeline": [],
    }
    peft: PipelineRow | None = None
    for row in bench_pipeline(task, names, rounds):
        peft = row if row.name == "peft" else peft
        echo(_contest(row, peft))
        results["pipeline"].append(row.to_json())
        _keep(results, json)


def _sequences(model: str, data: Path | None, samples: int, seq_len: int) -> list[Tensor]:
    """Token ids (1, seq_len) each."""
    import tempfile

    from corda_kernels.models import load_tokenizer
    from corda_kernels.text import help_topics, token_batches

    with tempfile.TemporaryDirectory() as folder:
        text = data or help_topics(Path(folder) / "python-help.txt")
        batches = token_batches(text, load_tokenizer(model), samples=samples, seq_len=seq_len)
    return [batch["input_ids"] for batch in batches]


def _contest(row: PipelineRow, peft: PipelineRow | None) -> str:
    from corda_kernels.bench.pipeline import STAGES

    if not row.passed:
        return f"{row.name} computes something else (overlap {row.overlap:.4f}): no speed"
    stages = " ".join(
        f"{row.stages[stage]:>13.1f}" if stage in row.stages else " " * 13 for stage in STAGES
    )
    ratios = ""
    if peft is not None:
        beyond = f"{peft.beyond / row.beyond:.2f}" if row.beyond > 0 else "–"
        ratios = (
            f"{peft.seconds / row.seconds:>8.2f} {beyond:>8} "
            f"{row.growth / peft.growth if peft.growth else 0:>8.2f}"
        )
    overlap = "" if row.overlap is None else f"{row.overlap:.6f}"
    return (
        f"{row.name:<11} {row.seconds:>9.1f} {stages} {row.beyond:>9.1f} "
        f"{row.growth / 2**20:>6.0f} MiB {ratios:>26} {overlap:>9}"
    )


@bench.command()
def svd(
    cases: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas: model (--model and --cov), smollm2-block, llama2-7b, "
            "4096x4096, 11008x4096, 4096x11008, whose layers are made up in these shapes "
            "(llama2-7b, 224 layers, is for a GPU), and batched, many small matrices. By default "
            "model or smollm2-block, 4096x4096, and batched on a GPU."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of the case model.")] = None,
    cov: Annotated[
        Path | None, typer.Option(help="The model's covariances, from `calibrate`.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Components; 32 for models, 128 for LLaMA-2's shapes.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas: published, ours, svd_lowrank, on a GPU torch's drivers."
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Check large layers, too: takes minutes.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Also measure the peak memory of ours.")] = True,
    device: options.Device = "auto",
    json: Annotated[Path | None, typer.Option(help="A file for all results.")] = None,
) -> None:
    """Time the decomposition of layers at both ends against PEFT's and torch's."""
    from corda_kernels.bench import batched_svd
    from corda_kernels.bench.svd import bench_case, check_methods
    from corda_kernels.bench.svd_cases import check_case, make_case
    from corda_kernels.bench.svd_memory import bench_memory
    from corda_kernels.bench.svd_methods import published_missing
    from corda_kernels.bench.timing import environment
    from corda_kernels.outputs import check_output

    if json is not None:
        check_output(json)
    where = options.torch_device(device)
    file = None if cov is None else str(cov)
    chosen = None if methods is None else [part.strip() for part in methods.split(",")]
    check_methods(chosen or (), where)
    if cases is None:
        cases = f"{'smollm2-block' if model is None else 'model'},4096x4096"
        cases += ",batched" if where.type == "cuda" else ""
    names = [part.strip() for part in cases.split(",")]
    for name in names:
        if name != "batched":
            check_case(name, rank, model, file)
    described = environment(where)
    echo(", ".join(f"{key} {value}" for key, value in described.items()))
    missing = published_missing()
    if missing is not None:
        echo(f"without published: {missing}")
    echo(
        f"{'case':<13} {'layers':>6} {'r':>4} {'end':<8} {'method':<11} {'p50 s':>9} "
        f"{'× published':>11} {'error':>11}"
    )
    results: dict[str, Any] = {"environment": described, "rows": [], "memory": []}
    for name in names:
        if name == "batched":
            rows = batched_svd.print_table(batched_svd.SIZES, batched_svd.BATCH, where)
            results["batched_svd"] = [row.to_json() for row in rows]
            _keep(results, json)
            continue
        case = make_case(name, where, rank, model, file)
        for row in bench_case(case, chosen, exact=exact):
            results["rows"].append(row.to_json())
            echo(_svd_line(row))
            _keep(results, json)
        if memory:
            for grown in bench_memory(case, where, model, file):
                results["memory"].append(grown.to_json())
                echo(grown.line())
                _keep(results, json)


def _svd_line(row: SvdRow) -> str:
    case = f"{row.case:<13} {row.layers:>6} {row.rank:>4} {row.which:<8} {row.method:<11}"
    if row.error is None:
        error = "not checked"
    else:
        # An energy of 1.0001 times the least possible is 1e-4 too much.
        error = f"{row.error:.1e}" if row.which == "largest" else f"1 + {row.error - 1:.1e}"
    error += "" if row.passed else " wrong"
    if row.timing is None:
        return f"{case} {'no speed':>21} {error:>11}"
    speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
    return f"{case} {row.timing.p50:>9.3f} {speedup:>11} {error:>11}"


def _keep(results: dict[str, Any], file: Path | None) -> None:
    """Writes the file that was asked for; after every row, so that who stops it keeps them."""
    from corda_kernels.files import write_json

    if file is not None:
        write_json(file, results)


def _at_least_one(option: str, *numbers: int) -> None:
    for number in numbers:
        if number < 1:
            raise ConfigError(f"{option} must be at least 1, not {number}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--dims must be numbers separated by commas, got {text!r}") from error


def _line(row: Row) -> str:
    case = f"{row.backend:<10} {row.tokens:>7} {row.channels:>6} {row.dtype:>9}"
    if row.timing is None or row.tflops is None or row.plain is None:
        return f"{case} {'wrong: no speed':>{80 - 9}} {row.error:>8.1e}"
    milliseconds = " ".join(
        f"{1e3 * value:>9.3f}" for value in (row.timing.p20, row.timing.p50, row.timing.p80)
    )
    peak = "" if row.peak is None else f"{row.peak:.0%}"
    statistics = row.timing.p50 / row.plain - 1
    wrong = "" if row.passed else " wrong"  # a baseline
    return (
        f"{case} {milliseconds} {row.speedup or 0:>8.2f} {row.tflops:>8.2f} "
        f"{row.ceiling or 0:>8.0%} {peak:>8} {statistics:>+7.1%} {row.error:>8.1e}{wrong}"
    )


def _calibration(model: str, device: str) -> CalibrationRow:
    import torch

    from corda_kernels.bench.covariance import bench_calibration

    network = options.load(model, None, device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = network.config.vocab_size
    batches = [
        {"input_ids": torch.randint(0, vocabulary, (4, 512), generator=generator)} for _ in range(4)
    ]
    return bench_calibration(network, batches)
