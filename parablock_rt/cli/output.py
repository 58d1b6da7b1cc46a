"""The commands' output: progress on standard error, results on standard output or in a file. Decides nothing.

A run outlives its readers: if a pipe is closed or the disk is full, the output is lost and the command goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape

from parablock_rt.errors import ConfigError
from parablock_rt.observe.run_folder import to_json

if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:
    _Handler = logging.StreamHandler  # takes no parameter before Python 3.11


def mute(stream: IO[str] | None) -> None:
    """Discards everything still written to the stream, and its buffered output, whose flush would fail at exit."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the stream is closed, or is not a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Progress(Console):
    """Prints until printing fails once, and nothing after that."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """rich calls this for a closed pipe; its own version would end the program."""
        self.quiet = True
        mute(self.file)


class LogHandler(_Handler):
    """Logs warnings with their level and news without, to standard error. Once that fails, logs nothing more."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname} {text}"

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if isinstance(sys.exc_info()[1], OSError):
            mute(self.stream)
        else:
            super().handleError(record)


console = Progress(stderr=True, highlight=False, soft_wrap=True)


def tell_news() -> None:
    """Makes the log show news as well as warnings: which clients joined, and what the command waits for."""
    logging.getLogger("parablock").setLevel(logging.INFO)


def say_what_is_left(folder: Path, again: str = "") -> None:
    """Says where the partial record of a stopped run is. `again`: how to resume the run."""
    console.print(f"Stopped before the end. What there is of it is in {escape(str(folder))}{escape(again)}")


def deliver(result: dict[str, Any], file: Path | None, as_json: bool) -> None:
    """Writes a run's summary to `file`, if given, and prints it as JSON if `as_json`. Raises ConfigError."""
    text = to_json(result, indent=2)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write the summary {file}: {error.strerror}") from error
    if as_json:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            mute(sys.stdout)
