"""Run folders before their contents are touched: which command owns a folder, and how a server is resumed from one.

A command holds its folder's lock from its first check to its end, so that a second command is refused before it can
replace any of the first one's files. Writes only the lock and a server's settings.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from parablock_rt.errors import CheckpointError, ConfigError
from parablock_rt.observe import run_folder
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.outcome import ClosedRound

STATE = "state"
"""A durable server's state, in its run folder."""

_SETTINGS = "settings.json"  # a durable server's settings, in its run folder
_RUNS = Path("runs")
_NOT_SETTINGS = ("config_file", "resume", "run_dir", "summary", "as_json")


@contextlib.contextmanager
def held(path: Path | None, kind: str) -> Iterator[Path]:
    """`run_folder.held` for this command; for None, of a new folder below runs/. Raises its errors."""
    made: list[Path] = []
    if path is None:
        made = [folder for folder in (_RUNS, *_RUNS.parents) if not folder.exists()]
        try:
            path = _new(kind)
        except OSError as error:
            raise run_folder.not_writable(_RUNS, error) from error
        made.insert(0, path)
    with run_folder.held(path, made):
        yield path


def _new(kind: str) -> Path:
    """Makes a new folder, numbered if its name is taken: several commands of a script may start in the same second."""
    name = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = _RUNS / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def read_resumed(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --resume: loads the settings with which the run was started; flags and --config override them."""
    if path is not None:
        file = path / _SETTINGS
        try:
            settings = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"there is no run to resume in {path} ({error}); expected the run folder of `parablock serve`"
            ) from error
        if not isinstance(settings, dict):
            raise ConfigError(
                f"expected the settings of a run in {file}, a table by their names; found a "
                f"{type(settings).__name__}. Put back the file that `parablock serve` wrote, or start a new run"
            )
        context.default_map = settings | {"run_dir": str(path)} | dict(context.default_map or {})
    return path


def earlier_rounds(path: Path, resume: Path | None, *, durable: bool) -> Iterable[ClosedRound]:
    """The closed rounds of the run that is resumed in the folder; empty for a new run.

    Raises ConfigError if another run would be overwritten, or if --run-dir names another folder than --resume. Raises
    CheckpointError for a state that is damaged, missing or in use by another server.
    """
    if resume is None:
        if durable:
            try:
                Checkpoint.refuse_to_replace(path / STATE)
            except CheckpointError as error:
                raise ConfigError(
                    f"the run folder {path} holds the state of a run already: go on with that by --resume, or choose "
                    "another folder with --run-dir"
                ) from error
        return []
    if path.resolve() != resume.resolve():
        raise ConfigError(f"expected no --run-dir beside --resume, which goes on in {resume}; found {path}")
    return Checkpoint.closed_rounds(path / STATE)


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given to `serve`, for a later --resume. Paths are absolute, so that it works from any directory."""
    settings = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None and name not in _NOT_SETTINGS
    }
    if (model := Path(settings["model"]).expanduser()).is_dir():  # otherwise it is a model's name
        settings["model"] = str(model.absolute())
    return settings


def write_settings(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Writes the settings for a later --resume. Raises ConfigError."""
    try:
        folder.write_json(_SETTINGS, settings)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder.path / _SETTINGS} ({error.strerror}), without which the run cannot be resumed; make "
            "room, choose another folder with --run-dir, or say --no-durable"
        ) from error
