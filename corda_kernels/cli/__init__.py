"""The command line: thin, one file a command."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from corda_kernels import __version__, errors
from corda_kernels.cli import options
from corda_kernels.cli.bench import bench
from corda_kernels.cli.calibrate import calibrate
from corda_kernels.cli.demo import demo
from corda_kernels.cli.doctor import doctor
from corda_kernels.cli.export import export, merge
from corda_kernels.cli.init import init
from corda_kernels.cli.inspect import inspect
from corda_kernels.cli.plan import plan
from corda_kernels.cli.printing import echo

app = typer.Typer(
    name="corda-kernels",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (demo, plan, init, calibrate, inspect, export, merge, doctor):
    app.command()(command)
app.add_typer(bench)


_INTERRUPTED = 130  # the exit status after Ctrl-C
# About the model or the whole text, and not about one rank's share of the work.
_COMMON = (errors.DataWarning, errors.LeftOutWarning, errors.RankDeficientWarning)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback; may stand anywhere.")
    ] = False,
) -> None:
    """Initialise LoRA adapters from calibration text (CorDA and CorDA++).

    init runs a model over some text, takes the covariance of every linear layer's inputs, and makes
    a LoRA from the weights and these covariances. Train it with PEFT, Trainer or TRL; then export
    or merge it.

    \b
    Example:
      corda-kernels init MODEL my-adapter --mode ipm --data my-task.txt \\
          --samples 64 --seq-len 512

    corda-kernels COMMAND --help explains a command. Errors are one line on stderr, with exit
    status 2.
    """
    if version:
        echo(f"corda_kernels {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line: an error is one line on stderr and exit status 2; Ctrl-C, 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # stderr never fails over a letter, see sys.stderr
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        _quiet()
    try:
        app(args=arguments)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # on which Typer is silent
            resume = "; --resume continues from the last checkpoint"
            hint = resume if "calibrate" in arguments else ""
            echo(f"{_who()}interrupted: no file is half written{hint}", err=True)
        raise
    except Exception as error:
        if debug:
            raise
        message = str(error)
        if not isinstance(error, errors.CordaError | OSError):
            message = (
                f"unexpected {type(error).__name__}: {message}; run again with --debug to see "
                "where it came from, and please report it"
            )
        echo(f"{_who()}error: {' '.join(message.split())}", err=True)
        raise SystemExit(2) from error


def _who() -> str:
    """Which rank speaks, if there are several."""
    return f"rank {os.environ.get('RANK', 0)}: " if options.under_torchrun() else ""


def _quiet() -> None:
    """Shows this package's own warnings, each as one line, and no other library's.

    Those that every rank has alike only the first rank shows.
    """
    for library in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(library, "error")
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", errors.CordaWarning)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if options.first_rank() or not isinstance(message, _COMMON):
            echo(f"{_who()}warning: {message}", err=True)

    warnings.showwarning = show
