"""What the commands say: progress on standard error, results on standard output or in a file. Decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from parablock_rt.errors import ConfigError
from parablock_rt.observe.run_folder import RunFolder, to_json

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say_what_is_left(folder: RunFolder, again: str = "") -> None:
    """Where the partial record of a run is that was stopped, and `again`: how to go on with it."""
    console.print(f"Stopped before the end. What there is of it is in {escape(str(folder.path))}{again}")


def deliver(result: dict[str, Any], file: Path | None, as_json: bool) -> None:
    """Writes a run's summary to `file` and prints it as JSON, each if wanted. Raises ConfigError."""
    text = to_json(result, indent=2)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write the summary {file}: {error.strerror}") from error
    if as_json:
        print(text)
