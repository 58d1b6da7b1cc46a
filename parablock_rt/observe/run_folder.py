"""The run folder, `runs/NAME/`: the files that a run leaves, all in strict JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from parablock_rt.errors import ConfigError
from parablock_rt.observe import trace
from parablock_rt.observe.timeline import Timeline

_DEEPEST = 64  # levels


def to_json(content: Any, indent: int | None = None) -> str:
    """`content` as strict JSON, which has neither NaN nor infinity: a number that is not finite becomes null, and so
    does what is nested more than 64 levels deep, which only damaged files have.

    `content` may consist of JSON's types, tuples and msgspec structs.
    """
    return json.dumps(_finite(content, _DEEPEST), indent=indent, allow_nan=False)


def _finite(content: Any, levels: int) -> Any:
    if isinstance(content, msgspec.Struct):
        return _finite(msgspec.structs.asdict(content), levels)
    if isinstance(content, dict):
        return {key: _finite(value, levels - 1) for key, value in content.items()} if levels else None
    if isinstance(content, (list, tuple)):
        return [_finite(value, levels - 1) for value in content] if levels else None
    return None if isinstance(content, float) and not math.isfinite(content) else content


_LEFT_BY_A_RUN = ("summary.json", "telemetry.jsonl", "trace.json", "report.html")


class RunFolder:
    """The folder of one run. Every file is either replaced as a whole or appended to line by line."""

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        """Creates the folder and removes the files of an earlier run, whose summary a reader could take for this run's.

        With `resumed`, the earlier files belong to this run and stay; only metrics.jsonl is emptied, as the server
        writes its rounds again from its saved state. Raises ConfigError when the folder cannot be written.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").write_text("")
            for name in () if resumed else _LEFT_BY_A_RUN:
                (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run folder {path} cannot be written ({error.strerror}); choose another with --run-dir"
            ) from error

    def write_json(self, name: str, content: Any) -> None:
        """Writes `name` in one step, so that a reader never sees half a file."""
        temporary = self.path / f".{name}.part"
        temporary.write_text(to_json(content, indent=2) + "\n")
        temporary.replace(self.path / name)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        self.append("metrics.jsonl", record)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Appends a line to the file `name`."""
        with (self.path / name).open("a") as file:
            file.write(to_json(record) + "\n")

    def write_trace(self, timeline: Timeline, samples: Iterable[trace.CounterSample] = ()) -> None:
        """Writes trace.json; see `trace.write`."""
        temporary = self.path / ".trace.json.part"
        trace.write(temporary, timeline, samples)
        temporary.replace(self.path / "trace.json")
