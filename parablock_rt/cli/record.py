"""A run's record: a line a round and telemetry while it goes on; then summary, trace and page. Starts nothing.

A run never fails for its record: what cannot be written is left out, with one warning that names the file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from parablock_rt import report
from parablock_rt.client.run import RoundReport
from parablock_rt.observe import reporters
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import Telemetry
from parablock_rt.observe.timeline import Timeline
from parablock_rt.server.outcome import ClosedRound

log = logging.getLogger("parablock")


class Record:
    """What one process leaves in its run folder, and reports elsewhere if wanted. In the folder from `begin` on."""

    def __init__(self, path: Path, period: float, prometheus: str | None, report_to: str | None) -> None:
        """`path`: the run folder, which keeps all that is in it. `period`: seconds between samples, 0: none. The
        others as for `reporters.open_all`. Raises ConfigError."""
        self.telemetry = Telemetry(reporters.open_all(path, prometheus, report_to), period)
        self._samples = period > 0
        self._lock = threading.Lock()
        self._folder: RunFolder | None = None
        self._early: list[ClosedRound | RoundReport] = []
        self._lost: set[str] = set()

    def begin(self, folder: RunFolder, past: Iterable[ClosedRound] = ()) -> None:
        """The folder is this run's. `past`: the rounds of the same run before it was taken up again."""
        with self._lock:
            self._folder = folder
            if self._samples:
                self._try("telemetry.jsonl", lambda: self.telemetry.add(reporters.JsonLines(folder)))
            for closed in past:
                self._append(closed)
            for done in self._early:
                self._note(done)

    def round(self, done: ClosedRound | RoundReport) -> None:
        """Notes a round. Any thread; one that closes before `begin` is noted then."""
        with self._lock:
            if self._folder is None:
                self._early.append(done)
            else:
                self._note(done)

    def finish(self, summary: dict[str, Any], timeline: Timeline) -> None:
        """Writes what there is to say once the run is over."""
        folder = self._folder
        if folder is None:
            return
        self._try("summary.json", lambda: folder.write_json("summary.json", summary))
        self._try("trace.json", lambda: folder.write_trace(timeline, self.telemetry.counters()))
        report.write(folder.path)

    def _note(self, done: ClosedRound | RoundReport) -> None:
        self._append(done)
        self.telemetry.round(msgspec.to_builtins(done))

    def _append(self, done: ClosedRound | RoundReport) -> None:
        assert self._folder is not None
        folder = self._folder
        self._try("metrics.jsonl", lambda: folder.append_metrics(msgspec.to_builtins(done)))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Writes a file of the folder, unless that has failed before: behind half a line no other can be read."""
        assert self._folder is not None
        if name in self._lost:
            return
        try:
            write()
        except OSError as error:
            self._lost.add(name)
            log.warning(
                "%s cannot be written (%s) and is not complete; the run itself goes on",
                self._folder.path / name,
                error.strerror or error,
            )
