"""`corda-kernels bench`: tables of speed, each against the honest baseline of the same run."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option, Typer

from corda_kernels import outputs
from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    from corda_kernels.bench.covariance import CalibrationRow, Row

bench = Typer(name="bench", help="Time the kernels here, against torch.", no_args_is_help=True)


@bench.command()
def covariance(
    dims: Annotated[
        str, Option(help="Numbers of channels (columns of X), separated by commas.")
    ] = "576,1536,4096",
    tokens: Annotated[int, Option(help="Number of tokens (rows of X).")] = 8192,
    dtypes: Annotated[
        str, Option(help="Dtypes of X, separated by commas: float32, bfloat16, float16, float64.")
    ] = "float32,bfloat16",
    device: options.Device = "auto",
    model: Annotated[
        str | None, Option(help="Model whose calibration on 16 × 512 tokens is timed too.")
    ] = None,
    json: Annotated[Path | None, Option(help="File to write all results to, as JSON.")] = None,
) -> None:
    """Time C += XᵀX, the kernel of calibration.

    Compares every backend of this machine, which also takes the channels' statistics, with
    torch.addmm, which does not. Prints the median time, the ratio to torch.addmm, the share of a
    full product's speed, and the error against float64. A result that is wrong gets no time.

    \b
    Example:
      corda-kernels bench covariance --dims 576,1536 --json covariance.json
    """
    from corda_kernels import arguments, files, models
    from corda_kernels.bench.covariance import HEADER, bench_calibration, bench_syrk
    from corda_kernels.bench.timing import environment

    where = options.torch_device(device)
    widths = _parts(dims)
    if not all(width.isdecimal() and int(width) for width in widths):
        raise ConfigError(f"--dims must be numbers from 1 on, separated by commas, got {dims!r}")
    arguments.whole_number("--tokens", tokens, 1)
    types = [models.parse_dtype(dtype) for dtype in _parts(dtypes)]
    if json is not None:
        outputs.check_output(json)
    found: dict[str, Any] = {"environment": environment(where), "syrk": []}

    def show(row: Row | CalibrationRow) -> None:
        """Prints a row, and writes the file after every one, so that who stops it keeps them."""
        echo(row.line())
        if json is not None:
            files.write_json(json, found)

    echo(", ".join(f"{key} {value}" for key, value in found["environment"].items()))
    echo(HEADER)
    for dtype, width in itertools.product(types, widths):
        for row in bench_syrk(tokens, int(width), dtype, where):
            found["syrk"].append(asdict(row))
            show(row)
    if model is not None:
        calibration = bench_calibration(options.load(model, None, str(where)))
        found["calibration"] = asdict(calibration)
        show(calibration)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
