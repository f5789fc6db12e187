"""`corda-kernels bench`: tables of speed, each against the honest baseline of the same run."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    import torch

bench = typer.Typer(
    name="bench", help="Measure kernels against their baselines.", no_args_is_help=True
)
Json = Annotated[Path | None, typer.Option(help="A file for all results.")]


@bench.command()
def covariance(
    dims: Annotated[str, typer.Option(help="Channels, separated by commas.")] = "576,1536,4096",
    tokens: Annotated[int, typer.Option(help="Rows of X.")] = 8192,
    dtypes: Annotated[str, typer.Option(help="Of X, separated by commas.")] = "float32,bfloat16",
    device: options.Device = "auto",
    model: Annotated[
        str | None, typer.Option(help="Also time the calibration of this model, 16 × 512 tokens.")
    ] = None,
    json: Json = None,
) -> None:
    """Time C += XᵀX with outlier statistics, and the calibration of a model around it."""
    from corda_kernels.arguments import whole_number
    from corda_kernels.bench.covariance import HEADER, bench_calibration, bench_syrk
    from corda_kernels.models import parse_dtype

    where = _device(device, json)
    widths = _parts(dims)
    if not all(width.isdecimal() and int(width) for width in widths):
        raise ConfigError(f"--dims must be numbers from 1 on, separated by commas, got {dims!r}")
    whole_number("--tokens", tokens, 1)
    types = [parse_dtype(dtype) for dtype in _parts(dtypes)]
    results = _begin(where, "syrk")
    echo(HEADER)
    for dtype, width in itertools.product(types, widths):
        for row in bench_syrk(tokens, int(width), dtype, where):
            _add(results, "syrk", row, json)
    if model is not None:
        timed = bench_calibration(options.load(model, None, str(where)))
        _add(results, "calibration", timed, json)


@bench.command()
def svd(
    cases: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas: model (--model and --cov), smollm2-block, llama2-7b, "
            "4096x4096, 11008x4096, 4096x11008, whose layers are made up in these shapes "
            "(llama2-7b, 224 layers, is for a GPU). By default model or smollm2-block, and "
            "4096x4096."
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
    json: Json = None,
) -> None:
    """Time the decomposition of layers at both ends against PEFT's and torch's."""
    from corda_kernels.bench import svd as svd_methods
    from corda_kernels.bench.svd import HEADER, bench_case, bench_memory
    from corda_kernels.bench.svd_cases import check_case, make_case

    where = _device(device, json)
    source = None if model is None or cov is None else (model, str(cov))
    chosen = svd_methods.methods(where, [] if methods is None else _parts(methods))
    if cases is None:
        cases = f"{'smollm2-block' if model is None else 'model'},4096x4096"
    names = _parts(cases)
    for name in names:
        check_case(name, rank, source)
    results = _begin(where, "rows", "memory")
    missing = svd_methods.published_missing()
    if missing is not None:
        echo(f"without published: {missing}")
    echo(HEADER)
    for name in names:
        case = make_case(name, where, rank, source)
        for row in bench_case(case, chosen, exact=exact):
            _add(results, "rows", row, json)
        if memory:
            for grown in bench_memory(case, where, source):
                _add(results, "memory", grown, json)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _device(name: str, json: Path | None) -> torch.device:
    """The device to measure on, once it is known that the results can be written."""
    if json is not None:
        options.check_output(json)
    return options.torch_device(name)


def _begin(device: torch.device, *tables: str) -> dict[str, Any]:
    """Prints what is measured on; returns the results, whose tables are still empty."""
    from corda_kernels.bench.timing import environment

    described = environment(device)
    echo(", ".join(f"{key} {value}" for key, value in described.items()))
    return {"environment": described, **{table: [] for table in tables}}


def _add(results: dict[str, Any], table: str, row: Any, file: Path | None) -> None:
    """Prints a row, and writes the file after every one, so that who stops it keeps them."""
    from corda_kernels.files import write_json

    echo(row.line())
    if table in results:
        results[table].append(asdict(row))
    else:
        results[table] = asdict(row)
    if file is not None:
        write_json(file, results)
