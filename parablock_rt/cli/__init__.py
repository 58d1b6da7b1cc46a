"""The command line: `parablock demo | serve | join | plan | bench | report | top | trace | certs | doctor`.

Assembles the commands and maps their errors to exit codes: 0 done, 1 the run failed, 2 wrong usage. Computes nothing,
and prints only the version and errors.
"""

from __future__ import annotations

import logging
import signal
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from parablock_rt.cli import look, run
from parablock_rt.cli.output import LogHandler, console
from parablock_rt.errors import ConfigError, ParaBlockError
from parablock_rt.version import __version__

app = typer.Typer(
    help="Federated fine-tuning of large models, one block at a time, with the network behind the computation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(run.commands)
app.add_typer(look.commands)
app.add_typer(look.traces, name="trace")


def main() -> NoReturn:
    """The entry point; never returns."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler()])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's SIGTERM ends a run like Ctrl-C
    try:
        app(prog_name="parablock")  # ends with SystemExit: 0, or 2 after a usage error
    except ConfigError as error:
        _fail(error, 2)
    except (ParaBlockError, OSError) as error:
        _fail(error, 1)
    raise SystemExit(0)


def _fail(error: Exception, code: int) -> NoReturn:
    console.print(f"[red]error:[/red] {escape(str(error))}")
    raise SystemExit(code)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version, metavar="")
    ] = False,
) -> None: ...
