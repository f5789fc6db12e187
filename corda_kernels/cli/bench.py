"""`corda-kernels bench`: tables of speed, each against the honest baseline of the same run."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option, Typer

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    import torch

bench = Typer(
    name="bench",
    help="Time the kernels here, against torch and PEFT.",
    no_args_is_help=True,
)
Json = Annotated[Path | None, Option(help="File to write all results to, as JSON.")]


@bench.command()
def covariance(
    dims: Annotated[
        str, Option(help="Numbers of channels (columns of X), by commas.")
    ] = "576,1536,4096",
    tokens: Annotated[int, Option(help="Number of tokens (rows of X).")] = 8192,
    dtypes: Annotated[
        str, Option(help="Dtypes of X, by commas: float32, bfloat16, float16, float64.")
    ] = "float32,bfloat16",
    device: options.Device = "auto",
    model: Annotated[
        str | None, Option(help="Model whose calibration on 16 × 512 tokens is timed too.")
    ] = None,
    json: Json = None,
) -> None:
    """Time C += XᵀX, the kernel of calibration.

    Compares every backend of this machine, which also takes the channels' statistics, with
    torch.addmm, which does not. Prints the median time, the ratio to torch.addmm, the share of a
    full product's speed, and the error against float64. A result that is wrong gets no time.

    \b
    Example:
      corda-kernels bench covariance --dims 576,1536 --json covariance.json
    """
    from corda_kernels import arguments, models
    from corda_kernels.bench.covariance import HEADER, bench_calibration, bench_syrk

    where = options.torch_device(device)
    widths = _parts(dims)
    if not all(width.isdecimal() and int(width) for width in widths):
        raise ConfigError(f"--dims must be numbers from 1 on, separated by commas, got {dims!r}")
    arguments.whole_number("--tokens", tokens, 1)
    types = [models.parse_dtype(dtype) for dtype in _parts(dtypes)]
    results = _Results(where, json, {"syrk": []}, HEADER)
    for dtype, width in itertools.product(types, widths):
        for row in bench_syrk(tokens, int(width), dtype, where):
            results.add("syrk", row)
    if model is not None:
        results.add("calibration", bench_calibration(options.load(model, None, str(where))))


@bench.command()
def svd(
    cases: Annotated[
        str | None,
        Option(
            help="Layers, by commas: model (those of --model with --cov), or made-up ones in the "
            "shapes smollm2-block, llama2-7b (for a GPU), 4096x4096, 11008x4096, 4096x11008."
        ),
    ] = None,
    model: Annotated[
        str | None, Option(help="Model of the case 'model': a folder or hub id.")
    ] = None,
    cov: Annotated[Path | None, Option(help="Its covariance file, from calibrate.")] = None,
    rank: Annotated[
        int | None, Option(help="Number of components; by default 32, for LLaMA-2's shapes 128.")
    ] = None,
    methods: Annotated[
        str | None,
        Option(
            help="Methods, by commas: published (PEFT's), ours, svd_lowrank, on a GPU also torch's "
            "SVD drivers; by default all."
        ),
    ] = None,
    exact: Annotated[
        bool, Option("--exact", help="Check large layers against float64 too, which takes minutes.")
    ] = False,
    device: options.Device = "auto",
    json: Json = None,
) -> None:
    """Time the decomposition of layers, against PEFT's and torch's.

    For the largest components (IPM) and the smallest (KPM). Prints seconds, the ratio to PEFT and
    the error against float64. A result that is wrong gets no time.

    \b
    Example:
      corda-kernels bench svd --cases model --model MODEL --cov nq.safetensors
    """
    from corda_kernels.bench import svd as svds
    from corda_kernels.bench import svd_cases

    where = options.torch_device(device)
    source = None if model is None or cov is None else (model, str(cov))
    chosen = svds.methods(where, [] if methods is None else _parts(methods))
    names = _parts(cases or f"{'smollm2-block' if model is None else 'model'},4096x4096")
    for name in names:
        svd_cases.check_case(name, rank, source)
    missing = svds.published_missing()
    head = [] if missing is None else [f"without published: {missing}"]
    results = _Results(where, json, {"rows": []}, *head, svds.HEADER)
    for name in names:
        case = svd_cases.make_case(name, where, rank, source)
        for row in svds.bench_case(case, chosen, exact=exact):
            results.add("rows", row)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


class _Results:
    """What was measured on a device so far, printed row by row and kept in a file."""

    def __init__(
        self, device: torch.device, file: Path | None, tables: dict[str, Any], *head: str
    ) -> None:
        from corda_kernels.bench.timing import environment
        from corda_kernels.outputs import check_output

        if file is not None:
            check_output(file)
        described = environment(device)
        self._file, self._found = file, {"environment": described} | tables
        for line in (", ".join(f"{key} {value}" for key, value in described.items()), *head):
            echo(line)

    def add(self, table: str, row: Any) -> None:
        """Prints a row, and writes the file after every one, so that who stops it keeps them."""
        from corda_kernels.files import write_json

        echo(row.line())
        if table in self._found:
            self._found[table].append(asdict(row))
        else:
            self._found[table] = asdict(row)
        if self._file is not None:
            write_json(self._file, self._found)
