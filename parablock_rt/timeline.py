"""What happened when: spans on named tracks, written as a Chrome trace that Perfetto and chrome://tracing open.

Times are nanoseconds of the monotonic clock, which all processes of one machine share; so the files of several
processes can be joined as they are. One thread at a time records.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parablock_rt.errors import ConfigError

MAX_SPANS = 200_000
"""A timeline keeps the last ones, so that a long run does not fill the memory."""


@dataclass(frozen=True)
class Span:
    """One stretch of time on one track. `args` are shown when a reader clicks on it."""

    track: str
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Any] = field(default_factory=dict)


class Timeline:
    """The spans of one process."""

    def __init__(self, process: str) -> None:
        self.process = process
        self.spans: deque[Span] = deque(maxlen=MAX_SPANS)

    def add(self, track: str, name: str, start_ns: int, end_ns: int, **args: Any) -> None:
        """Notes a span that was measured elsewhere (native code, say)."""
        self.spans.append(Span(track, name, start_ns, end_ns, args))

    @contextmanager
    def span(self, track: str, name: str, **args: Any) -> Iterator[None]:
        """Notes how long the body of the `with` statement takes, also when it raises."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(track, name, start, time.monotonic_ns(), **args)


def trace_events(timelines: Iterable[Timeline]) -> list[dict[str, Any]]:
    """Chrome trace events: one process a timeline, one thread a track; times in microseconds."""
    events: list[dict[str, Any]] = []
    for pid, timeline in enumerate(timelines, start=1):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": timeline.process}})
        tracks = {track: tid for tid, track in enumerate(dict.fromkeys(s.track for s in timeline.spans), start=1)}
        for track, tid in tracks.items():
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
        for span in timeline.spans:
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.track,
                    "pid": pid,
                    "tid": tracks[span.track],
                    "ts": span.start_ns / 1e3,
                    "dur": (span.end_ns - span.start_ns) / 1e3,
                    "args": span.args,
                }
            )
    return events


def join_traces(traces: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One trace out of several whole ones; `traces`: by a name that is put in front of their processes' names."""
    joined: list[dict[str, Any]] = []
    pid = 0
    for name, parts in traces.items():
        for part in parts:
            own: dict[int, int] = {}
            for event in part["traceEvents"]:
                if event["pid"] not in own:
                    pid += 1
                    own[event["pid"]] = pid
                moved = event | {"pid": own[event["pid"]]}
                if event["ph"] == "M" and event["name"] == "process_name":
                    moved["args"] = {"name": f"{name}: {event['args']['name']}"}
                joined.append(moved)
    return {"displayTimeUnit": "ms", "traceEvents": joined}


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON, which knows neither NaN nor infinity: a number that is not finite becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class RunFolder:
    """`runs/NAME/`: what a run leaves behind. Every file is replaced whole or appended a line at a time."""

    def __init__(self, path: Path) -> None:
        """Creates the folder, without the metrics of an earlier run. Raises ConfigError when it cannot be written."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").write_text("")
        except OSError as error:
            raise ConfigError(
                f"the run folder {path} cannot be written ({error.strerror}); choose another with --run-dir"
            ) from error

    def write_json(self, name: str, content: Any) -> None:
        """Writes `name` in one step, so that a reader never sees half a file."""
        temporary = self.path / f".{name}.part"
        temporary.write_text(to_json(content, indent=2) + "\n")
        temporary.replace(self.path / name)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(to_json(record) + "\n")

    def write_trace(self, timelines: Iterable[Timeline]) -> None:
        """Writes trace.json."""
        self.write_json("trace.json", {"displayTimeUnit": "ms", "traceEvents": trace_events(timelines)})
